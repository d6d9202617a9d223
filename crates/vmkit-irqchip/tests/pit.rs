//! The 8254 by its data sheet, and port 0x61.

use proptest::prelude::*;
use vmkit_irqchip::{PIT_HZ, Pit, PitRun};

/// The first nanosecond of input clock `t`.
fn at(t: u64) -> u64 {
    (u128::from(t) * 1_000_000_000).div_ceil(PIT_HZ.into()) as u64
}

/// A timer that is driven by input clocks.
struct Bench {
    pit: Pit,
}

impl Bench {
    fn new() -> Self {
        Self { pit: Pit::new() }
    }

    fn write(&mut self, t: u64, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            self.pit.write(port, value, at(t));
        }
    }

    /// Programs counter 2 with low and high byte at clock 0.
    fn program2(&mut self, mode: u8, count: u16) {
        let [low, high] = count.to_le_bytes();
        self.write(0, &[(0x43, 0xb0 | mode << 1), (0x42, low), (0x42, high)]);
    }

    fn out2(&mut self, t: u64) -> bool {
        self.pit.read(0x61, at(t)) & 0x20 != 0
    }

    /// Latches and reads counter 2.
    fn count2(&mut self, t: u64) -> u16 {
        self.pit.write(0x43, 0x80, at(t));
        u16::from_le_bytes([self.pit.read(0x42, at(t)), self.pit.read(0x42, at(t))])
    }

    fn gate(&mut self, t: u64, high: bool) {
        self.pit.write(0x61, high.into(), at(t));
    }

    /// Runs to clock `until`, by deadlines only; the clocks of the ticks.
    fn ticks(&mut self, until: u64) -> Vec<u64> {
        let mut ticks = Vec::new();
        while let Some(now) = self.pit.next_deadline().filter(|&now| now <= at(until)) {
            if self.pit.advance(now) {
                ticks.push((u128::from(now) * u128::from(PIT_HZ) / 1_000_000_000) as u64);
            }
            assert!(self.pit.next_deadline() > Some(now) || self.pit.next_deadline().is_none());
        }
        ticks
    }
}

/// OUT, clock by clock, from the clock after the write on.
fn wave(bench: &mut Bench, clocks: std::ops::Range<u64>) -> String {
    clocks.map(|t| if bench.out2(t) { '-' } else { '_' }).collect()
}

#[test]
fn mode_0_goes_high_at_terminal_count_and_stays() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(0, 4);
    assert_eq!(wave(&mut bench, 0..9), "_____----");
    assert_eq!((bench.count2(1), bench.count2(3), bench.count2(5)), (4, 2, 0));
    assert_eq!(bench.count2(6), 0xffff);
}

#[test]
fn mode_0_stops_while_the_gate_is_low() {
    let mut bench = Bench::new();
    bench.program2(0, 4);
    assert_eq!(wave(&mut bench, 0..9), "_________");
    bench.gate(10, true);
    bench.gate(12, false);
    assert_eq!((bench.count2(12), bench.count2(20)), (2, 2));
    bench.gate(20, true);
    assert_eq!(wave(&mut bench, 20..24), "__--");
}

#[test]
fn mode_0_stops_at_the_first_byte_of_a_new_count() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(0, 4);
    assert!(bench.out2(6));
    bench.write(6, &[(0x42, 2)]);
    assert!(!bench.out2(100));
    bench.write(100, &[(0x42, 0)]);
    assert_eq!(wave(&mut bench, 100..105), "___--");
}

#[test]
fn mode_1_is_a_shot_per_trigger() {
    let mut bench = Bench::new();
    bench.program2(1, 3);
    assert_eq!(wave(&mut bench, 0..6), "------");
    bench.gate(10, true);
    assert_eq!(wave(&mut bench, 10..16), "-___--");
    // A trigger in the shot begins it anew; a new count waits for one.
    bench.gate(20, false);
    bench.gate(20, true);
    bench.write(21, &[(0x42, 5), (0x42, 0)]);
    bench.gate(22, false);
    bench.gate(22, true);
    assert_eq!(wave(&mut bench, 22..30), "-_____--");
}

#[test]
fn mode_2_is_low_for_one_clock_per_period() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(2, 3);
    assert_eq!(wave(&mut bench, 0..10), "---_--_--_");
    assert_eq!((bench.count2(1), bench.count2(2), bench.count2(3), bench.count2(4)), (3, 2, 1, 3));
    // A new count takes effect at the end of the period.
    bench.write(10, &[(0x42, 5), (0x42, 0)]);
    assert_eq!(wave(&mut bench, 10..20), "--_----_--");
    // The gate stops it, with OUT high, and restarts it.
    bench.gate(20, false);
    assert_eq!(wave(&mut bench, 20..24), "----");
    bench.gate(24, true);
    assert_eq!(wave(&mut bench, 24..30), "-----_");
}

#[test]
fn mode_3_is_a_square_wave() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(3, 4);
    assert_eq!(wave(&mut bench, 1..9), "--__--__");
    let counts = [1, 2, 3, 4].map(|t| bench.count2(t));
    assert_eq!(counts, [4, 2, 4, 2]);
    bench.program2(3, 5);
    assert_eq!(wave(&mut bench, 1..11), "---__---__");
    let counts = [1, 2, 3, 4, 5].map(|t| bench.count2(t));
    assert_eq!(counts, [4, 2, 0, 4, 2]);
}

#[test]
fn modes_4_and_5_strobe_low_for_a_clock() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(4, 3);
    assert_eq!(wave(&mut bench, 0..8), "----_---");
    let mut bench = Bench::new();
    bench.program2(5, 3);
    assert_eq!(wave(&mut bench, 0..8), "--------");
    bench.gate(10, true);
    assert_eq!(wave(&mut bench, 10..17), "----_--");
}

#[test]
fn a_count_of_zero_is_the_longest() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(0, 0);
    assert!(!bench.out2(65536));
    assert!(bench.out2(65537));
    bench.write(0, &[(0x43, 0xb1), (0x42, 0), (0x42, 0)]);
    assert!(!bench.out2(10_000));
    assert!(bench.out2(10_001));
}

#[test]
fn bcd_counts_in_decimal() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.write(0, &[(0x43, 0xb5), (0x42, 0x00), (0x42, 0x10)]);
    assert_eq!((bench.count2(1), bench.count2(2), bench.count2(1001)), (0x1000, 0x0999, 0x1000));
    // Digits above 9 are no crash.
    bench.write(0, &[(0x42, 0xff), (0x42, 0xff)]);
    bench.count2(5000);
}

#[test]
fn a_latch_holds_until_read_and_status_comes_first() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.program2(2, 1000);
    bench.pit.write(0x43, 0x80, at(11));
    bench.pit.write(0x43, 0x80, at(21));
    assert_eq!((bench.pit.read(0x42, at(50)), bench.pit.read(0x42, at(60))), (0xde, 0x03));
    assert_eq!(bench.pit.read(0x42, at(101)), (900 % 256) as u8);
    assert_eq!(bench.pit.read(0x42, at(101)), (900 / 256) as u8);
    // Read back status and count of counter 2.
    bench.pit.write(0x43, 0xc8, at(201));
    let bytes = [0; 3].map(|_| bench.pit.read(0x42, at(300)));
    assert_eq!(bytes, [0xb4, 0x20, 0x03]);
    // A count that is not loaded yet is a null count.
    bench.write(300, &[(0x42, 1), (0x42, 1)]);
    bench.pit.write(0x43, 0xe8, at(301));
    assert_eq!(bench.pit.read(0x42, at(301)), 0xf4);
}

#[test]
fn single_byte_access_modes() {
    let mut bench = Bench::new();
    bench.gate(0, true);
    bench.write(0, &[(0x43, 0x94), (0x42, 100)]);
    assert_eq!(bench.pit.read(0x42, at(11)), 90);
    assert_eq!(bench.pit.read(0x42, at(12)), 89);
    bench.write(12, &[(0x43, 0xa4), (0x42, 2)]);
    assert_eq!(bench.pit.read(0x42, at(13)), 2);
    assert_eq!(bench.pit.read(0x42, at(14)), 1);
}

#[test]
fn counter_0_ticks_at_its_period_without_drift() {
    for mode in [2, 3] {
        // Linux's HZ=100: 11932 clocks.
        let mut bench = Bench::new();
        bench.write(0, &[(0x43, 0x30 | mode << 1), (0x40, 0x9c), (0x40, 0x2e)]);
        let ticks = bench.ticks(11932 * 1000 + 2);
        assert_eq!(ticks.len(), 1000);
        assert!(ticks.iter().zip(1..).all(|(&t, n)| t == 1 + 11932 * n));
    }
}

#[test]
fn counter_0_ticks_once_in_the_other_modes() {
    let mut bench = Bench::new();
    bench.write(0, &[(0x43, 0x30), (0x40, 100), (0x40, 0)]);
    assert_eq!(bench.ticks(1_000_000), [101]);
    assert_eq!(bench.pit.next_deadline(), None);
    bench.write(1_000_000, &[(0x40, 100), (0x40, 0)]);
    assert_eq!(bench.ticks(2_000_000), [1_000_101]);
    bench.write(2_000_000, &[(0x43, 0x38), (0x40, 100), (0x40, 0)]);
    assert_eq!(bench.ticks(3_000_000), [2_000_102]);
    // Without a gate that rises, modes 1 and 5 never begin.
    for control in [0x32, 0x3a] {
        bench.write(3_000_000, &[(0x43, control), (0x40, 100), (0x40, 0)]);
        assert!(bench.ticks(4_000_000).is_empty());
    }
}

#[test]
fn ticks_that_were_missed_are_made_up_for_in_peace() {
    let mut bench = Bench::new();
    bench.write(0, &[(0x43, 0x34), (0x40, 0xe8), (0x40, 0x03)]);
    assert!(bench.pit.advance(at(5_500)));
    // Five edges passed, at 1001 to 5001. The other four come half a period apart, while new ones
    // join the queue, until all are out.
    assert!(!bench.pit.advance(at(5_500)));
    assert_eq!(bench.ticks(6_500), [6_000, 6_500]);
    assert_eq!(bench.ticks(100_001).len(), 100 - 3);
    assert_eq!(bench.ticks(103_001), [101_001, 102_001, 103_001]);
}

#[test]
fn an_age_without_a_call_costs_nothing_and_owes_little() {
    let mut bench = Bench::new();
    bench.write(0, &[(0x43, 0x14), (0x40, 1)]);
    assert!(bench.pit.advance(u64::MAX / 2));
    let mut now = u64::MAX / 2;
    let mut delivered = 0;
    while bench.pit.save(now).backlog > 1 {
        now = bench.pit.next_deadline().unwrap();
        delivered += u32::from(bench.pit.advance(now));
        if delivered > 100 {
            break;
        }
    }
    assert!(bench.pit.save(now).backlog <= 250);
    let _ = bench.pit.advance(u64::MAX);
}

#[test]
fn reprogramming_forgets_what_was_owed() {
    let mut bench = Bench::new();
    bench.write(0, &[(0x43, 0x34), (0x40, 0xe8), (0x40, 0x03)]);
    let _ = bench.pit.advance(at(5_500));
    bench.write(5_600, &[(0x43, 0x30), (0x40, 0), (0x40, 0)]);
    assert_eq!(bench.ticks(100_000), [5_601 + 65_536]);
}

#[test]
fn leaving_a_low_output_for_a_high_one_is_an_edge() {
    let mut bench = Bench::new();
    bench.write(0, &[(0x43, 0x30), (0x40, 0), (0x40, 0)]);
    assert!(!bench.pit.advance(at(10)));
    bench.write(10, &[(0x43, 0x34)]);
    assert!(bench.pit.advance(at(10)));
    assert!(!bench.pit.advance(at(11)));
}

#[test]
fn port_61_keeps_its_bits_and_toggles_refresh() {
    let mut bench = Bench::new();
    bench.pit.write(0x61, 0xff, 0);
    assert_eq!(bench.pit.read(0x61, 0) & 0x0f, 0x0f);
    assert_eq!(bench.pit.read(0x61, 0) & 0xc0, 0);
    let changes = (0..1800)
        .map(|t| bench.pit.read(0x61, at(t)) & 0x10)
        .collect::<Vec<_>>()
        .windows(2)
        .filter(|w| w[0] != w[1])
        .count();
    assert_eq!(changes, 99);
}

#[test]
fn impossible_states_are_refused() {
    let mut bench = Bench::new();
    bench.program2(2, 1000);
    let good = bench.pit.save(at(7));
    let mut bad = [good; 8];
    bad[0].channels[2].mode = 6;
    bad[1].channels[1].access = 0;
    bad[2].channels[0].count = 0;
    bad[3].channels[0].next_count = Some(65_537);
    bad[4].channels[0].gate = false;
    bad[5].port61 = 1;
    bad[6].backlog = 251;
    bad[7].channels[0].run = PitRun::Counting(i64::MIN);
    let mut other = Pit::new();
    for state in bad {
        assert!(other.load(&state, at(7)).is_err());
        assert_eq!(other, Pit::new());
    }
    assert_eq!(other.load(&good, at(1_000_007)), Ok(()));
    assert_eq!(other.save(at(1_000_007)), good);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u16, u8),
    Read(u16),
    Advance,
}

fn step() -> impl Strategy<Value = (u64, Step)> {
    let port = prop::sample::select(&Pit::PORTS[..]);
    let step = prop_oneof![
        4 => (port.clone(), any::<u8>()).prop_map(|(port, value)| Step::Write(port, value)),
        2 => port.prop_map(Step::Read),
        2 => Just(Step::Advance),
    ];
    (prop_oneof![0..2_000_u64, 0..200_000_000_u64, Just(0_u64)], step)
}

fn run(pit: &mut Pit, now: u64, step: &Step) -> (u8, bool) {
    match *step {
        Step::Write(port, value) => {
            pit.write(port, value, now);
            (0, false)
        }
        Step::Read(port) => (pit.read(port, now), false),
        Step::Advance => (0, pit.advance(now)),
    }
}

proptest! {
    #[test]
    fn a_restored_timer_goes_on_as_if_nothing_had_been(
        before in prop::collection::vec(step(), 0..40),
        after in prop::collection::vec(step(), 0..40),
    ) {
        let mut pit = Pit::new();
        let mut now = 0;
        for (wait, step) in &before {
            now += wait;
            run(&mut pit, now, step);
        }
        // A backlog is paced by the clock of its machine; compare without.
        let mut now = now + 1;
        while pit.save(now).backlog > 0 {
            now = pit.next_deadline().unwrap_or(now).max(now);
            let _ = pit.advance(now);
        }
        let mut copy = Pit::new();
        prop_assert_eq!(copy.load(&pit.save(now), now), Ok(()));
        for (wait, step) in &after {
            now += wait;
            prop_assert_eq!(run(&mut pit, now, step), run(&mut copy, now, step));
            prop_assert_eq!(pit.next_deadline(), copy.next_deadline());
        }
    }

    #[test]
    fn a_latched_count_falls_by_the_clock(count in 2..=0xffff_u16, bcd: bool, t in 1..1_000_000_u64) {
        let mut bench = Bench::new();
        bench.gate(0, true);
        let count = if bcd { count % 999 + 2 } else { count };
        let raw = if bcd {
            u16::from_str_radix(&count.to_string(), 16).unwrap()
        } else {
            count
        };
        let [low, high] = raw.to_le_bytes();
        bench.write(0, &[(0x43, 0xb4 | u8::from(bcd)), (0x42, low), (0x42, high)]);
        let seen = bench.count2(t);
        let seen = if bcd { format!("{seen:x}").parse().unwrap() } else { seen };
        prop_assert_eq!(u64::from(seen), u64::from(count) - (t - 1) % u64::from(count));
    }

    #[test]
    fn edges_do_not_depend_on_when_one_looks(
        mode in 0..6_u8,
        count in 2..5_000_u16,
        later in prop::option::of((1..20_000_u64, 2..5_000_u16)),
        mut looks in prop::collection::vec(0..60_000_u64, 0..60),
    ) {
        let [low, high] = count.to_le_bytes();
        let program = [(0x43, 0x30 | mode << 1), (0x40, low), (0x40, high)];
        let run = |looks: &[u64]| {
            let mut bench = Bench::new();
            bench.write(0, &program);
            let mut total = 0;
            let mut pending = later;
            for &t in looks.iter().chain([&60_000]) {
                if let Some((when, count)) = pending.filter(|&(when, _)| when <= t) {
                    let [low, high] = count.to_le_bytes();
                    bench.write(when, &[(0x40, low), (0x40, high)]);
                    pending = None;
                }
                total += u32::from(bench.pit.advance(at(t)));
            }
            total + bench.pit.save(at(60_000)).backlog
        };
        looks.sort_unstable();
        let mut all: Vec<u64> = (0..60_000).collect();
        all.extend(&looks);
        all.sort_unstable();
        // Rarely looking owes at most 250 edges.
        prop_assert_eq!(run(&all).min(250), run(&looks).min(250));
    }
}

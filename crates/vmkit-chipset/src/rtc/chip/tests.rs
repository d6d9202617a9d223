//! The chip's registers, flags and time.

use proptest::prelude::*;

use super::*;

/// 2024-02-29 23:59:58 UTC, a Thursday, a quarter into the second.
const EPOCH: Duration = Duration::from_millis(1_709_251_198_250);

struct Bench {
    chip: Chip,
    running: Duration,
}

impl Bench {
    fn new() -> Self {
        let running = Duration::ZERO;
        Self { chip: Chip::new(&[0; SIZE], Now { running, wall: EPOCH }), running }
    }

    fn now(&self) -> Now {
        Now { running: self.running, wall: EPOCH + self.running }
    }

    fn wait(&mut self, milliseconds: u64) {
        self.running += Duration::from_millis(milliseconds);
    }

    fn read(&mut self, register: u8) -> u8 {
        self.chip.select(register);
        self.chip.read(self.now())
    }

    fn write(&mut self, register: u8, value: u8) {
        self.chip.select(register);
        self.chip.write(value, self.now());
    }

    fn time(&mut self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY_OF_MONTH, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|register| self.read(register))
    }

    /// Sets the time as Linux does.
    fn set(&mut self, fields: [(u8, u8); 3]) {
        let (control, frequency) = (self.read(B), self.read(A));
        self.write(B, control | B_SET);
        self.write(A, frequency | 0x70);
        for (register, value) in fields {
            self.write(register, value);
        }
        self.write(B, control);
        self.write(A, frequency);
    }
}

#[test]
fn the_host_time_shows_in_all_four_formats() {
    let mut bench = Bench::new();
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
    bench.write(B, B_24_HOURS | B_BINARY);
    assert_eq!(bench.time(), [20, 24, 2, 29, 5, 23, 59, 58]);
    bench.write(B, B_BINARY);
    assert_eq!(bench.read(HOURS), 11 | HOUR_PM);
    bench.write(B, 0);
    assert_eq!(bench.read(HOURS), 0x11 | HOUR_PM);
    bench.wait(2000);
    assert_eq!(bench.time(), [0x20, 0x24, 0x03, 0x01, 0x06, 0x12, 0x00, 0x00]);
    bench.wait(12 * 3600 * 1000);
    assert_eq!(bench.read(HOURS), 0x12 | HOUR_PM);
}

#[test]
fn nothing_reads_as_ones() {
    let mut bench = Bench::new();
    for register in 0..128 {
        assert_ne!(bench.read(register), 0xFF, "{register:#x}");
    }
    assert_eq!(bench.read(D), D_VALID);
}

#[test]
fn the_time_a_guest_sets_runs_on_from_half_a_second() {
    let mut bench = Bench::new();
    bench.set([(HOURS, 0x10), (MINUTES, 0x20), (SECONDS, 0x30)]);
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x10, 0x20, 0x30]);
    bench.wait(499);
    assert_eq!(bench.read(SECONDS), 0x30);
    bench.wait(2);
    assert_eq!(bench.read(SECONDS), 0x31);
    bench.wait(60_000);
    assert_eq!((bench.read(MINUTES), bench.read(SECONDS)), (0x21, 0x31));
}

#[test]
fn a_field_written_while_time_runs_changes_only_that_field() {
    let mut bench = Bench::new();
    bench.write(YEAR, 0x30);
    assert_eq!(bench.time(), [0x20, 0x30, 0x02, 0x28, 0x05, 0x23, 0x59, 0x58]);
    bench.wait(750);
    assert_eq!(bench.read(SECONDS), 0x59, "the second ends when it would have");
}

#[test]
fn held_time_stands_still_and_cannot_be_updating() {
    let mut bench = Bench::new();
    bench.write(B, B_24_HOURS | B_SET | B_UPDATE);
    assert_eq!(bench.read(B), B_24_HOURS | B_SET);
    for _ in 0..20 {
        bench.wait(100);
        assert_eq!(bench.read(SECONDS), 0x58);
        assert_eq!(bench.read(A) & A_UPDATING, 0);
    }
}

#[test]
fn updating_is_seen_just_before_an_update_and_never_after() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(A), A_POWER_ON);
    bench.wait(749);
    assert_eq!(bench.read(A) & A_UPDATING, 0);
    bench.running += Duration::from_micros(800);
    assert_eq!(bench.read(A) & A_UPDATING, A_UPDATING);
    bench.running += Duration::from_micros(200);
    assert_eq!(bench.read(A) & A_UPDATING, 0);
    bench.write(A, 0xFF);
    assert_eq!(bench.read(A) & A_UPDATING, 0);
}

#[test]
fn flags_say_what_happened_since_they_were_read() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(C), 0);
    bench.wait(1);
    assert_eq!(bench.read(C), B_PERIODIC, "1024 Hz");
    bench.wait(1000);
    assert_eq!(bench.read(C), B_PERIODIC | B_UPDATE);
    assert_eq!(bench.read(C), 0);
    // The alarm registers hold zeros: midnight.
    bench.wait(1000);
    assert_eq!(bench.read(C), B_PERIODIC | B_UPDATE | B_ALARM);
    bench.write(B, B_24_HOURS | B_UPDATE);
    bench.wait(1000);
    assert!(!bench.chip.interrupt());
    assert_eq!(bench.chip.next_interrupt(bench.now()), Some(Duration::ZERO));
    bench.chip.advance(bench.now());
    assert!(bench.chip.interrupt());
    assert_eq!(bench.read(C), C_INTERRUPT | B_PERIODIC | B_UPDATE);
    assert!(!bench.chip.interrupt());
}

#[test]
fn the_next_interrupt_is_known_before_it_comes() {
    let mut bench = Bench::new();
    assert!(!bench.chip.is_armed());
    assert_eq!(bench.chip.next_interrupt(bench.now()), None);
    bench.write(B, B_24_HOURS | B_UPDATE);
    assert_eq!(bench.chip.next_interrupt(bench.now()), Some(Duration::from_millis(750)));
    bench.write(B, B_24_HOURS | B_ALARM);
    assert_eq!(bench.chip.next_interrupt(bench.now()), Some(Duration::from_millis(1750)));
    bench.write(SECONDS_ALARM, 0x05);
    bench.write(MINUTES_ALARM, 0xFF);
    bench.write(HOURS_ALARM, 0x07);
    let wait = Duration::from_millis(1750) + Duration::from_secs(7 * 3600 + 5);
    assert_eq!(bench.chip.next_interrupt(bench.now()), Some(wait));
    bench.write(SECONDS_ALARM, 0x75);
    assert_eq!(bench.chip.next_interrupt(bench.now()), None, "a second that never comes");
    bench.write(A, 0x2F);
    bench.write(B, B_24_HOURS | B_PERIODIC);
    assert_eq!(bench.chip.next_interrupt(bench.now()), Some(Duration::from_millis(500)));
    bench.write(A, 0x20);
    assert_eq!(bench.chip.next_interrupt(bench.now()), None);
}

#[test]
fn periodic_rates_are_those_of_the_data_sheet() {
    let mut bench = Bench::new();
    for (select, rate) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (8, 256), (15, 2)] {
        bench.write(A, 0x20 | select);
        assert_eq!(bench.chip.periodic_rate(), Some(rate));
    }
}

#[test]
fn reset_keeps_time_and_memory_and_ends_interrupts() {
    let mut bench = Bench::new();
    bench.write(0x40, 0x77);
    bench.set([(HOURS, 0x10), (MINUTES, 0x20), (SECONDS, 0x30)]);
    bench.write(B, B_24_HOURS | EVENTS);
    bench.wait(2000);
    bench.chip.advance(bench.now());
    bench.chip.reset();
    assert!(!bench.chip.interrupt() && !bench.chip.is_armed());
    assert_eq!((bench.read(0x40), bench.read(HOURS)), (0x77, 0x10));
}

#[test]
fn impossible_saved_state_is_refused() {
    let bench = Bench::new();
    let good = bench.chip.save();
    assert!(Chip::load(good.clone(), bench.now()).is_ok());
    let with = |register: u8, value: u8| {
        let mut bytes = good.bytes.clone();
        bytes[usize::from(register)] = value;
        bytes
    };
    for bad in [
        RtcState { bytes: vec![0; 127], ..good.clone() },
        RtcState { bytes: with(A, A_UPDATING), ..good.clone() },
        RtcState { bytes: with(B, B_SET | B_UPDATE), ..good.clone() },
        RtcState { flags: C_INTERRUPT, ..good.clone() },
        RtcState { offset: i128::MIN, ..good.clone() },
        RtcState { seen_second: i64::MAX, ..good.clone() },
    ] {
        assert!(Chip::load(bad.clone(), bench.now()).is_err(), "{bad:?}");
    }
}

/// The first match after `after`, by looking at every second.
fn alarm_by_search(chip: &Chip, after: i64) -> Option<i64> {
    (after + 1..=after + DAY).find(|at| {
        let of_day = at.rem_euclid(DAY);
        [
            (HOURS_ALARM, of_day / 3600),
            (MINUTES_ALARM, of_day / 60 % 60),
            (SECONDS_ALARM, of_day % 60),
        ]
        .iter()
        .all(|&(register, is)| {
            let byte = chip.byte(register);
            byte >= ALARM_ANY || i64::from(from_bcd(byte)) == is
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_alarm_is_the_one_a_search_finds(
        alarm in prop::array::uniform3(prop_oneof![0_u8..=0x60, Just(0xC0), Just(0xFF)]),
        after in 0_i64..4 * DAY,
    ) {
        let mut bench = Bench::new();
        for (register, value) in [HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM].into_iter().zip(alarm) {
            bench.write(register, value);
        }
        prop_assert_eq!(bench.chip.next_alarm(after), alarm_by_search(&bench.chip, after));
    }

    /// Whatever a guest writes and however clocks jump, what follows is a time and a wait.
    #[test]
    fn no_access_leads_astray(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0_u8..16, any::<u8>()], any::<u8>(), any::<u64>(), any::<u64>()),
            0..100,
        ),
    ) {
        let mut chip = Chip::new(&[0; SIZE], Now { running: Duration::ZERO, wall: EPOCH });
        for (write, register, value, running, wall) in accesses {
            let now = Now { running: Duration::from_micros(running), wall: Duration::from_micros(wall) };
            chip.select(register);
            if write {
                chip.write(value, now);
            } else {
                chip.read(now);
            }
            let saved = chip.save();
            prop_assert_eq!(Chip::load(saved.clone(), now).unwrap().save(), saved);
            chip.advance(now);
            if let Some(wait) = chip.next_interrupt(now) {
                let then = Now { running: now.running + wait, wall: now.wall + wait };
                chip.advance(then);
            }
        }
    }
}

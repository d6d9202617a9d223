//! Random accesses to the interrupt controllers and timers, with time running.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_irqchip::{Ioapic, LapicConfig, LocalApic, Pic, Pit};

#[derive(Arbitrary, Debug)]
enum Step {
    PicRead(u16),
    PicWrite(u16, u8),
    PicLevel(u8, bool),
    PicAcknowledge,
    PitRead(u16),
    PitWrite(u16, u8),
    IoapicRead(u64, u8),
    IoapicWrite(u64, [u8; 8], u8),
    IoapicLevel(u8, bool),
    ApicRead(u64, u8),
    ApicWrite(u64, [u8; 8], u8),
    ApicReadMsr(u32),
    ApicWriteMsr(u32, u64),
    ApicAcknowledge,
    Time(u32),
}

fn width(n: u8) -> usize {
    1 << (n & 3)
}

fuzz_target!(|steps: Vec<Step>| {
    let (mut pic, mut pit, mut ioapic) = (Pic::new(), Pit::new(), Ioapic::new());
    let mut apic = LocalApic::new(LapicConfig::new(0));
    let mut now = 0_u64;
    for step in steps {
        let mut data = [0; 8];
        match step {
            Step::PicRead(port) => drop(pic.read(port)),
            Step::PicWrite(port, value) => pic.write(port, value),
            Step::PicLevel(irq, high) => pic.set_level(irq, high),
            Step::PicAcknowledge => drop(pic.acknowledge()),
            Step::PitRead(port) => drop(pit.read(port, now)),
            Step::PitWrite(port, value) => pit.write(port, value, now),
            Step::IoapicRead(at, n) => ioapic.read(at, &mut data[..width(n)]),
            Step::IoapicWrite(at, bytes, n) => {
                ioapic.write(at, &bytes[..width(n)], &mut |m| {
                    let _ = apic.accept(&m);
                    apic.is_software_enabled()
                });
            }
            Step::IoapicLevel(pin, high) => {
                ioapic.set_level(pin, high, &mut |m| {
                    let _ = apic.accept(&m);
                    apic.is_software_enabled()
                });
            }
            Step::ApicRead(at, n) => apic.read_mmio(at, &mut data[..width(n)], now),
            Step::ApicWrite(at, bytes, n) => {
                let _ = apic.write_mmio(at, &bytes[..width(n)], now);
            }
            Step::ApicReadMsr(msr) => drop(apic.read_msr(msr, now)),
            Step::ApicWriteMsr(msr, value) => drop(apic.write_msr(msr, value, now)),
            Step::ApicAcknowledge => drop(apic.acknowledge()),
            Step::Time(by) => {
                now = now.saturating_add(by.into());
                apic.advance(now);
                let _ = pit.advance(now);
            }
        }
    }
});

//! A guest that does anything to each chipset device, with time running. The first field picks the
//! device; now and then it is reset, or saved and loaded, which must change nothing.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_fuzz::{Access, Machine};

#[derive(Arbitrary, Debug)]
enum Step {
    Access(Access),
    Reset,
    SaveAndLoad,
}

fuzz_target!(|input: (u8, Vec<Step>)| {
    let (kind, steps) = input;
    let machine = Machine::chipset(kind);
    for step in &steps {
        match step {
            Step::Access(access) => machine.access(access),
            Step::Reset => machine.reset(),
            Step::SaveAndLoad => machine.paused(|device| {
                let saved = device.save();
                if !saved.is_empty() {
                    assert!(device.load(&saved), "refused its own state: {saved:?}");
                    assert_eq!(device.save(), saved);
                }
            }),
        }
    }
});

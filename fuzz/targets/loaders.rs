//! Hostile guest images: a typed error or a loaded guest, never a panic or memory without bound.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmkit_boot::{Boot, BootContext, Elf, Linux, Multiboot};
use vmkit_memory::{Backing, RamLayout};

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, image)) = bytes.split_first() else { return };
    let layout = RamLayout::pc(32 << 20).unwrap();
    let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
    let context = BootContext::new(&ram, &layout).vcpus(1);
    let image = image.to_vec();
    let _ = match kind % 4 {
        0 => Linux::from_bytes(image).and_then(|guest| guest.load(&context)).map(drop),
        1 => Multiboot::from_bytes(image).and_then(|guest| guest.load(&context)).map(drop),
        2 => Elf::from_bytes(image).and_then(|guest| guest.load(&context)).map(drop),
        _ => vmkit_boot::extract_vmlinux(&image).map(drop),
    };
});

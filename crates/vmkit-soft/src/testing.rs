//! Processors to test with: a few MiB of memory, identity-mapped, in the mode a test wants.

use std::sync::Arc;

use vmkit_device::ManualClock;
use vmkit_device::memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout};
use vmkit_hypervisor::x86::Segment;
use vmkit_hypervisor::{CpuModel, Hypervisor, IoFlow, MapAccess, PartitionSpec, VcpuIo};
use vmkit_irqchip::{LapicConfig, LocalApic};
use vmkit_memory::GuestMemoryBackend;

use crate::cpu::{CS, Cpu};
use crate::partition::PartitionInner;
use crate::shared::VcpuShared;

/// Bytes of memory a test processor has.
pub(crate) const MEMORY: u64 = 16 << 20;

/// A processor with its memory.
pub(crate) struct Bench {
    pub cpu: Box<Cpu>,
    pub ram: GuestRam,
}

/// Nobody answers.
pub(crate) struct Silence;

impl VcpuIo for Silence {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        IoFlow::Stop
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

impl Bench {
    /// In real mode, as after reset.
    pub fn real() -> Self {
        let ram =
            vmkit_memory::allocate(&RamLayout::pc(MEMORY).unwrap(), Backing::Anonymous).unwrap();
        let spec = PartitionSpec::new(1, Arc::new(ManualClock::default()));
        let soft = crate::SoftHypervisor::new();
        let inner = Arc::new(PartitionInner::new(&spec));
        let partition = crate::partition::SoftPartition { inner: inner.clone() };
        for region in ram.iter() {
            let region = vmkit_memory::MemoryRegion::with_arc(region.get_mmap(), GuestAddress(0));
            vmkit_hypervisor::Partition::map(
                &partition,
                GuestAddress(0),
                Arc::new(region.unwrap()),
                MapAccess::WRITE,
            )
            .unwrap();
        }
        let model = CpuModel::with_features("test", soft.capabilities().features);
        let shared = Arc::new(VcpuShared::new(LocalApic::new(LapicConfig::new(0))));
        Self { cpu: Cpu::new(0, &model, inner, shared), ram }
    }

    /// In 64-bit mode, ring 0, the first GiB identity-mapped (tables at 0x1000), stack at 1 MiB.
    pub fn long() -> Self {
        let mut bench = Self::real();
        bench.ram.write_obj(0x2007_u64, GuestAddress(0x1000)).unwrap();
        bench.ram.write_obj(0x0087_u64, GuestAddress(0x2000)).unwrap();
        let cpu = &mut bench.cpu;
        cpu.control.cr0 = 0x8000_0033;
        cpu.control.cr4 = 0x620;
        cpu.control.cr3 = 0x1000;
        cpu.control.efer = 0xD01;
        cpu.segs = [Segment::data(0x10); 6];
        cpu.segs[CS] = Segment::code64(8);
        cpu.regs[crate::cpu::RSP] = 0x10_0000;
        cpu.update_mode();
        bench
    }

    /// Puts `code` at `at` and points RIP there.
    pub fn load(&mut self, at: u64, code: &[u8]) {
        self.ram.write_slice(code, GuestAddress(at)).unwrap();
        self.cpu.rip = at;
    }

    /// Runs until HLT, a trap or an OUT.
    pub fn go(&mut self) {
        self.cpu.lend_io(&mut Silence);
        while !self.cpu.halted && !self.cpu.stop && self.cpu.trap == crate::cpu::TrapKind::None {
            self.cpu.shared.begin_looking(self.cpu.instructions + 100_000);
            self.cpu.execute();
        }
        self.cpu.return_io();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{RAX, RCX, TrapKind};

    #[test]
    fn a_loop_counts_and_an_undefined_instruction_ends_it() {
        let mut bench = Bench::long();
        // mov ecx, 1000; xor eax, eax; top: add rax, rcx; dec rcx; jnz top; ud2
        bench.load(
            0x8000,
            &[
                0xB9, 0xE8, 3, 0, 0, 0x31, 0xC0, 0x48, 0x01, 0xC8, 0x48, 0xFF, 0xC9, 0x75, 0xF8,
                0x0F, 0x0B,
            ],
        );
        bench.go();
        assert_eq!(bench.cpu.regs[RAX], 500_500);
        assert_eq!(bench.cpu.regs[RCX], 0);
        assert_eq!(bench.cpu.trap, TrapKind::Exception { vector: 6, error: None });
        assert_eq!(bench.cpu.rip, 0x800F);
        assert_eq!(bench.cpu.instructions, 2 + 3 * 1000);
    }

    #[test]
    fn code_that_overwrites_what_follows_runs_the_new_code() {
        let mut bench = Bench::long();
        // mov byte [rip + 1], 0x90 (over the ud2's first byte makes 90 0B ...): patch `ud2` into
        // `mov al, 5` and then ud2.
        let code = [
            0x66, 0xC7, 0x05, 0, 0, 0, 0, 0xB0, 0x05, // mov word [rip + 0], 0x05B0
            0x0F, 0x0B, // ud2, overwritten by mov al, 5
            0x0F, 0x0B,
        ];
        bench.load(0x8000, &code);
        bench.go();
        assert_eq!(bench.cpu.regs[RAX] & 0xFF, 5);
        assert_eq!(bench.cpu.rip, 0x800B);
    }

    #[test]
    fn a_write_by_a_device_to_decoded_code_is_seen() {
        let mut bench = Bench::long();
        bench.load(0x8000, &[0xB0, 1, 0x0F, 0x0B]);
        bench.go();
        assert_eq!(bench.cpu.regs[RAX] & 0xFF, 1);
        bench.cpu.trap = TrapKind::None;
        bench.load(0x8000, &[0xB0, 2, 0x0F, 0x0B]);
        bench.cpu.read_inbox();
        bench.go();
        // The test's processor is not among the partition's vCPUs, so the watch has nobody to tell;
        // the vCPU path is covered by the contract's tests. Decoding anew is what is checked here.
        bench.cpu.code.forget();
        bench.cpu.code_changed();
        bench.cpu.trap = TrapKind::None;
        bench.cpu.rip = 0x8000;
        bench.go();
        assert_eq!(bench.cpu.regs[RAX] & 0xFF, 2);
    }

    #[test]
    fn the_same_offset_in_two_code_segments_is_two_places() {
        let mut bench = Bench::real();
        // mov cx, 3; again: call 0x800:0; call 0x900:0; loop again; hlt
        let code = [0xB9, 3, 0, 0x9A, 0, 0, 0, 8, 0x9A, 0, 0, 0, 9, 0xE2, 0xF4, 0xF4];
        bench.load(0x7000, &code);
        // add ax, imm16; retf
        for (at, number) in [(0x8000, 1), (0x9000, 16)] {
            bench.load(at, &[5, number, 0, 0xCB]);
        }
        bench.cpu.segs[CS] = Segment::real(0x700);
        bench.cpu.rip = 0;
        bench.cpu.update_mode();
        bench.cpu.regs[crate::cpu::RSP] = 0x6000;
        bench.go();
        assert_eq!((bench.cpu.halted, bench.cpu.regs[RAX]), (true, 51));
    }

    #[test]
    fn instructions_may_cross_pages() {
        let mut bench = Bench::long();
        // mov rax, imm64 across a page end, then ud2.
        let mut code = vec![0x48, 0xB8];
        code.extend(0x1122_3344_5566_7788_u64.to_le_bytes());
        code.extend([0x0F, 0x0B]);
        bench.load(0x8FFB, &code);
        bench.go();
        assert_eq!(bench.cpu.regs[RAX], 0x1122_3344_5566_7788);
        assert_eq!(bench.cpu.rip, 0x8FFB + 10);
    }
}

//! What the conformance suite must know of this host: which cases it cannot pass, and why.
//!
//! Not every KVM runs guests on the processor alone. Where the probe fails, kernel code of guests runs
//! in KVM's instruction emulator, and where this host is itself emulated, what it runs on is no better
//! than that emulation. A case that such a host cannot pass is ignored, by name and with its reason.

#![allow(clippy::print_stdout, reason = "the report of a test without harness")]

use std::arch::x86_64::__cpuid;
use std::process::ExitCode;

use vmkit_hypervisor::Hypervisor;
use vmkit_hypervisor::conformance::runner::{self, Exception};
use vmkit_kvm::KvmHypervisor;
use vmkit_testkit::alloc::{self, Counting};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What KVM does differently from a processor on every host.
const KVM_LACKS: &[Exception<'_>] = &[
    (
        "apic::off_and_on_again_is_as_after_reset",
        "KVM keeps the local APIC's registers while it is off",
    ),
    (
        "memory::reads_are_not_dirty",
        "KVM counts a page as written when it maps it writable, be it for a read",
    ),
    ("apic::x2apic_reserved_registers", "KVM does not check reserved bits of x2APIC registers"),
    ("apic::x2apic_eoi_takes_zero_only", "KVM does not check what is written to EOI"),
];

const NO_LONG_SYSENTER: &str =
    "AMD's processors have no SYSENTER in 64-bit mode, nor has KVM there";

/// What an Intel model lacks on an AMD host.
const AMD_LACKS: &[Exception<'_>] = &[
    ("calls::sysenter_and_sysexit", NO_LONG_SYSENTER),
    ("calls::sysenter_without_a_selector", NO_LONG_SYSENTER),
];

const NO_INT: &str = "the emulator has no INT, INT3, INTO, INT1 or BOUND in protected mode";
const NO_X87_OR_SSE: &str = "the emulator has no x87 and SSE arithmetic";
const NO_GATES: &str = "the emulator has no call gates, and ring 3 faults on far calls";
const NO_SYSTEM_CALLS: &str = "ring 3 faults on SYSCALL, SYSENTER and INT";
const NO_32_BIT_PAGING: &str = "this KVM has no paging outside 64-bit mode";
const NO_IRETD: &str = "the emulator has no IRETD to another ring in 32-bit mode";
const HOST_TSC: &str = "the guest reads the host's TSC";
const NO_IN_SERVICE: &str = "interrupts are not kept in service until EOI";
const NO_STI_WINDOW: &str = "interrupts are looked at some instructions after STI";
const NO_DATA_BREAKPOINTS: &str = "the emulator does not look at data breakpoints";
const NO_CMPXCHG16B: &str = "the emulator has no CMPXCHG16B";
const UNCHECKED_UPPER_BITS: &str = "KVM's emulator drops bits 63:32 of CR0 and CR4";
const UNCHECKED: &str = "the emulator does not check this";

/// What KVM's instruction emulator, and hosts on which KVM needs it for all kernel code, lack.
const EMULATOR_LACKS: &[Exception<'_>] = &[
    ("state::tsc", HOST_TSC),
    ("exceptions::breakpoint", NO_INT),
    ("exceptions::overflow", NO_INT),
    ("exceptions::bound_range", NO_INT),
    ("exceptions::port_access_in_ring_3", "ring 3 has no ports, whatever IOPL says"),
    ("exceptions::software_interrupt", NO_INT),
    ("exceptions::software_interrupt_through_a_privileged_gate", NO_INT),
    ("exceptions::vector_past_the_table", NO_INT),
    ("exceptions::gate_not_present", NO_INT),
    ("exceptions::x87_error", NO_X87_OR_SSE),
    ("exceptions::sse_error", NO_X87_OR_SSE),
    ("exceptions::a_handler_can_return", NO_INT),
    ("debug::single_step_of_a_rep_stops_at_each_element", "the emulator steps over a whole REP"),
    ("debug::int1", NO_INT),
    ("debug::write_breakpoint", NO_DATA_BREAKPOINTS),
    ("debug::write_breakpoint_ignores_reads_and_neighbours", NO_DATA_BREAKPOINTS),
    ("debug::access_breakpoint", NO_DATA_BREAKPOINTS),
    ("paging::a_store_across_a_fault_stores_nothing", "the emulator stores page by page"),
    ("paging::a_bad_stack_is_a_double_fault", "CR2 is not set by faults during delivery"),
    ("modes::paging_of_32_bit", NO_32_BIT_PAGING),
    ("modes::paging_of_32_bit_with_large_pages", NO_32_BIT_PAGING),
    ("modes::paging_of_pae", NO_32_BIT_PAGING),
    ("modes::virtual_8086_mode", NO_IRETD),
    ("segments::lar_lsl_verr_verw", "the emulator has no LAR, LSL, VERR and VERW"),
    ("calls::iretq_to_ring_3_and_int_back", NO_SYSTEM_CALLS),
    ("calls::syscall_and_sysret", NO_SYSTEM_CALLS),
    ("calls::a_step_over_syscall_and_sysret_goes_by_tf_after_them", NO_SYSTEM_CALLS),
    ("calls::sysenter_and_sysexit", NO_SYSTEM_CALLS),
    ("calls::sysenter_without_a_selector", NO_SYSTEM_CALLS),
    ("calls::call_gate_of_64_bit", NO_GATES),
    ("calls::call_gate_of_32_bit_copies_parameters", NO_IRETD),
    ("calls::a_task_switch_by_jump", "the emulator has no task switches"),
    ("msrs::cpuid_is_the_models", "CPUID answers as the host's"),
    ("msrs::pat_takes_memory_types_only", UNCHECKED),
    ("msrs::cr0_and_cr4_above_bit_31", UNCHECKED_UPPER_BITS),
    ("msrs::cr4_bits_of_features_the_model_lacks", UNCHECKED),
    ("msrs::tsc_can_be_written", HOST_TSC),
    ("msrs::tsc_adjust_follows_tsc", HOST_TSC),
    ("msrs::rdtsc_is_privileged_with_tsd", UNCHECKED),
    ("interrupts::msi_fixed", NO_IN_SERVICE),
    ("interrupts::sti_nop_cli_lets_interrupts_in", NO_STI_WINDOW),
    ("interrupts::popf_lets_interrupts_in", NO_STI_WINDOW),
    ("interrupts::sti_shadow", NO_STI_WINDOW),
    ("interrupts::the_higher_priority_goes_first", NO_IN_SERVICE),
    ("interrupts::a_higher_priority_interrupts_a_handler", NO_IN_SERVICE),
    ("interrupts::self_ipi", NO_STI_WINDOW),
    ("controllers::ioapic_level_comes_again_until_it_is_low", NO_IN_SERVICE),
    ("controllers::ioapic_remote_irr", NO_IN_SERVICE),
    ("controllers::a_shared_wire_is_an_or", NO_IN_SERVICE),
    ("controllers::a_level_in_service_moves_to_another_partition", NO_IN_SERVICE),
    ("apic::processor_priority", NO_IN_SERVICE),
    ("apic::x2apic_interrupts", NO_STI_WINDOW),
    ("sharing::compare_and_exchange_of_16_bytes", NO_CMPXCHG16B),
    ("sharing::a_breakpoint_elsewhere_leaves_16_bytes_whole", NO_CMPXCHG16B),
    ("sharing::locks_beside_code_exclude_each_other", NO_CMPXCHG16B),
];

const TCG_ABORTS: &str = "QEMU aborts at a 32-bit IRETD to another ring in a nested guest";
const TCG_ERROR_CODES: &str = "QEMU's error codes of IDT faults are those of another table format";
const TCG_LIMITS: &str = "QEMU does not check limits and rights of segments";
const TCG_BREAKPOINTS: &str = "QEMU does not arm breakpoints when it enters a nested guest";
const TCG_RESERVED: &str = "QEMU leaves the present bit out of the error code of reserved bits";
const TCG_CHECKS: &str = "QEMU does not check this in a nested guest";

/// What QEMU's emulated processor does differently from a real one, as seen with version 7.2.
const TCG_LACKS: &[Exception<'_>] = &[
    ("exceptions::lock_without_memory_is_invalid", "QEMU saves RIP after the instruction"),
    ("exceptions::noncanonical_stack", "QEMU raises #GP for #SS"),
    ("exceptions::noncanonical_stack_at_a_call", "QEMU raises #GP for #SS"),
    ("exceptions::software_interrupt_through_a_privileged_gate", TCG_ERROR_CODES),
    ("exceptions::vector_past_the_table", TCG_ERROR_CODES),
    ("exceptions::gate_not_present", TCG_ERROR_CODES),
    ("exceptions::alignment_check_in_ring_3", "QEMU has no alignment checks"),
    ("exceptions::sse_error", "QEMU raises no SSE exceptions"),
    ("exceptions::double_fault", "QEMU delivers the second exception"),
    ("debug::int1", "QEMU has no INT1"),
    ("debug::execution_breakpoint", TCG_BREAKPOINTS),
    ("debug::execution_breakpoint_resumes_by_rf", TCG_BREAKPOINTS),
    ("debug::write_breakpoint", TCG_BREAKPOINTS),
    ("debug::write_breakpoint_ignores_reads_and_neighbours", TCG_BREAKPOINTS),
    ("debug::access_breakpoint", TCG_BREAKPOINTS),
    ("debug::general_detect", "QEMU has no general detection"),
    ("paging::no_execute_is_reserved_without_nxe", TCG_RESERVED),
    ("paging::reserved_bits", TCG_RESERVED),
    ("modes::real_mode_limits", TCG_LIMITS),
    ("modes::virtual_8086_mode", TCG_ABORTS),
    ("segments::a_limit_is_checked", TCG_LIMITS),
    ("segments::an_expand_down_segment", TCG_LIMITS),
    ("segments::segment_types_are_checked", TCG_LIMITS),
    ("segments::a_null_selector_may_be_loaded_but_not_used", TCG_LIMITS),
    ("calls::call_gate_of_32_bit_copies_parameters", TCG_ABORTS),
    ("msrs::cpuid_follows_osxsave_and_xcr0", "QEMU does not intercept XSETBV"),
    ("msrs::addresses_in_msrs_are_canonical", TCG_CHECKS),
    ("msrs::cr3_reserved_bits", TCG_CHECKS),
    ("msrs::cr0_and_cr4_above_bit_31", UNCHECKED_UPPER_BITS),
    ("msrs::cr8_reserved_bits", TCG_CHECKS),
];

/// Who this host's processor is: its maker, and the maker of the hypervisor under it, if any.
fn host() -> ([u8; 12], [u8; 12]) {
    let text = |registers: [u32; 3]| {
        let mut text = [0; 12];
        for (to, from) in text.iter_mut().zip(registers.iter().flat_map(|r| r.to_le_bytes())) {
            *to = from;
        }
        text
    };
    let maker = __cpuid(0);
    let under = if __cpuid(1).ecx >> 31 == 0 {
        [0; 12]
    } else {
        let leaf = __cpuid(0x4000_0000);
        text([leaf.ebx, leaf.ecx, leaf.edx])
    };
    (text([maker.ebx, maker.edx, maker.ecx]), under)
}

/// Runs the suite on what `backend` makes of this host's KVM, and calls it `name`.
pub fn run<H: Hypervisor>(name: &str, backend: impl FnOnce(KvmHypervisor) -> H) -> ExitCode {
    runner::count_allocations_by(|| alloc::count().allocations);
    let kvm = match KvmHypervisor::open() {
        Ok(kvm) => kvm,
        Err(error) => return runner::main_without_backend(name, &error.to_string()),
    };
    if let Err(error) = kvm.can_run_simple_guests() {
        return runner::main_without_backend(name, &error.to_string());
    }
    let mut exceptions = KVM_LACKS.to_vec();
    let (maker, under) = host();
    if &maker == b"AuthenticAMD" {
        exceptions.extend(AMD_LACKS);
    }
    if &under == b"TCGTCGTCGTCG" {
        exceptions.extend(TCG_LACKS);
    }
    if let Err(why) = kvm.probe() {
        println!("\nkvm runs simple guests only: {why}; cases that need more are ignored");
        exceptions.extend(EMULATOR_LACKS);
    }
    runner::main(&backend(kvm), &exceptions)
}

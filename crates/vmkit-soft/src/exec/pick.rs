//! Choosing specialised operations: by width, addressing and condition.

/// `f::<.., W>` for the width of `$bytes`.
macro_rules! by_width {
    ($bytes:expr, $f:ident $(, $g:ty)*) => {
        match $bytes {
            1 => $f::<$($g,)* $crate::cpu::W8> as $crate::code::Handler,
            2 => $f::<$($g,)* $crate::cpu::W16>,
            4 => $f::<$($g,)* $crate::cpu::W32>,
            _ => $f::<$($g,)* $crate::cpu::W64>,
        }
    };
}

/// `f::<.., W, A>` for the width of `$bytes` and flat or general addressing.
macro_rules! by_width_and_address {
    ($bytes:expr, $flat:expr, $f:ident $(, $g:ty)*) => {
        match ($bytes, $flat) {
            (1, true) => $f::<$($g,)* $crate::cpu::W8, $crate::exec::address::Flat>
                as $crate::code::Handler,
            (2, true) => $f::<$($g,)* $crate::cpu::W16, $crate::exec::address::Flat>,
            (4, true) => $f::<$($g,)* $crate::cpu::W32, $crate::exec::address::Flat>,
            (_, true) => $f::<$($g,)* $crate::cpu::W64, $crate::exec::address::Flat>,
            (1, false) => $f::<$($g,)* $crate::cpu::W8, $crate::exec::address::General>,
            (2, false) => $f::<$($g,)* $crate::cpu::W16, $crate::exec::address::General>,
            (4, false) => $f::<$($g,)* $crate::cpu::W32, $crate::exec::address::General>,
            (_, false) => $f::<$($g,)* $crate::cpu::W64, $crate::exec::address::General>,
        }
    };
}

/// `f::<CC, ..>` for the condition code `$cc`.
macro_rules! by_condition {
    ($cc:expr, $f:ident $(, $g:ty)*) => {
        match $cc {
            0 => $f::<0 $(, $g)*> as $crate::code::Handler,
            1 => $f::<1 $(, $g)*>,
            2 => $f::<2 $(, $g)*>,
            3 => $f::<3 $(, $g)*>,
            4 => $f::<4 $(, $g)*>,
            5 => $f::<5 $(, $g)*>,
            6 => $f::<6 $(, $g)*>,
            7 => $f::<7 $(, $g)*>,
            8 => $f::<8 $(, $g)*>,
            9 => $f::<9 $(, $g)*>,
            10 => $f::<10 $(, $g)*>,
            11 => $f::<11 $(, $g)*>,
            12 => $f::<12 $(, $g)*>,
            13 => $f::<13 $(, $g)*>,
            14 => $f::<14 $(, $g)*>,
            _ => $f::<15 $(, $g)*>,
        }
    };
}

/// The value of a `Result`, or the way out of an operation whose memory access trapped.
macro_rules! tri {
    ($cpu:ident, $op:ident, $e:expr) => {
        match $e {
            Ok(value) => value,
            Err($crate::cpu::Trap) => return $cpu.trap_exit($op),
        }
    };
}

pub(crate) use {by_condition, by_width, by_width_and_address, tri};

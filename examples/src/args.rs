//! Command-line values that both programs take.

use clap::ValueEnum;
use vmkit::virtio::RateLimit;
use vmkit::{Backend, InterruptControllers};

/// A size in bytes: a number, with K, M or G (powers of 1024) where wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no size: want for example 512M or 2G");
        let upper = text.to_ascii_uppercase();
        let short = upper.trim_end_matches("IB").trim_end_matches('B');
        let (digits, shift) = match short.char_indices().next_back() {
            Some((at, 'K')) => (&short[..at], 10),
            Some((at, 'M')) => (&short[..at], 20),
            Some((at, 'G')) => (&short[..at], 30),
            Some(_) => (short, 0),
            None => return Err(bad()),
        };
        let number: u64 = digits.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

/// A port number, decimal or hexadecimal with `0x`.
///
/// # Errors
/// What is wrong with the text.
pub fn port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no port: want 0 to 0xffff"))
}

/// `limit` with another rate: bytes per second as a [`Size`], or requests per second as in `500iops`.
///
/// # Errors
/// What is wrong with the text.
pub fn limit(limit: RateLimit, text: &str) -> Result<RateLimit, String> {
    let bad = || format!("`{text}` is no limit: want for example 10M (bytes a second) or 500iops");
    let (rate, is_operations) = match text.strip_suffix("iops") {
        Some(digits) => (digits.parse().map_err(|_| bad())?, true),
        None => (text.parse::<Size>().map_err(|_| bad())?.0, false),
    };
    match (rate, is_operations) {
        (0, _) => Err(bad()),
        (_, true) => Ok(limit.operations(rate)),
        (_, false) => Ok(limit.bytes(rate)),
    }
}

/// `--backend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// KVM if it can run this host's guests, else software.
    #[default]
    Auto,
    /// The software processor.
    Soft,
    /// KVM.
    Kvm,
}

impl From<BackendArg> for Backend {
    fn from(arg: BackendArg) -> Self {
        match arg {
            BackendArg::Auto => Self::Auto,
            BackendArg::Soft => Self::Software,
            BackendArg::Kvm => Self::Kvm,
        }
    }
}

/// `--agent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AgentArg {
    /// Through an agent that the guest runs, where its kernel has the drivers for that; else on the
    /// serial console.
    #[default]
    Auto,
    /// On the serial console, where standard error and the kernel's words are mixed in and nothing is
    /// to be read.
    Never,
}

/// `--irqchip`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum IrqchipArg {
    /// All interrupt controllers in the kernel, where there is KVM.
    #[default]
    Kernel,
    /// Local APICs in the kernel, PIC, IOAPIC and PIT in this process.
    Split,
}

impl From<IrqchipArg> for InterruptControllers {
    fn from(arg: IrqchipArg) -> Self {
        match arg {
            IrqchipArg::Kernel => Self::Full,
            IrqchipArg::Split => Self::Split,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_the_usual_suffixes() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("2GiB".parse(), Ok(Size(2 << 30)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        for bad in ["", "M", "1.5G", "12T", "99999999999G", "-1M"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_decimal_or_hexadecimal() {
        assert_eq!(port("0xf4"), Ok(0xF4));
        assert_eq!(port("1281"), Ok(0x501));
        assert!(port("65536").is_err());
    }
}

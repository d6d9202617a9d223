//! The virtio devices that a command line asks for, and the kernel modules that drive them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use vmkit::VmBuilder;
use vmkit::pci::PciHost;
use vmkit::virtio::{Mmio, Net, Pci, Pmem, Rng, VirtioDevice, Vsock};

use crate::Failure;
use crate::disk::DiskArg;
use crate::initramfs::Network;

/// The guest's address on vsock.
const GUEST_CID: u32 = 3;

/// The options for virtio devices.
#[derive(Clone, Debug, Default, Args)]
pub struct Devices {
    /// Adds a disk: `FILE[,ro][,format=raw|qcow2][,backing=DIR][,engine=positional|io_uring]
    /// [,queues=N][,limit=RATE]`. What a file holds is never guessed: it is raw unless `format` says
    /// otherwise. A qcow2 image may have backing files in DIR, and none elsewhere. RATE is bytes per
    /// second, with K, M or G, or requests per second as in `500iops`; both may be given. The guest
    /// finds the first disk as /dev/vda; with `root=/dev/vda` among the words of --append it boots the
    /// system on it.
    #[arg(long, value_name = "DISK")]
    pub disk: Vec<DiskArg>,
    /// Adds persistent memory: `FILE[,ro]`, a file of a multiple of 2 MiB that the guest sees as memory. It
    /// finds the first as /dev/pmem0, whose file system it may mount with `-o dax`.
    #[arg(long, value_name = "PMEM")]
    pub pmem: Vec<PmemArg>,
    /// Adds a network card: `passt` (the host's network, without privileges; needs the program of
    /// that name), `tap:NAME` (an interface of the host), or `none`.
    #[arg(long, value_name = "NET", default_value = "none")]
    pub net: NetArg,
    /// Adds a socket device. Programs of the host reach port N of the guest through DIR/vsock.sock
    /// (write `CONNECT N` and a line feed first); the guest reaches port N of the host where a
    /// program listens at DIR/vsock.sock_N.
    #[arg(long, value_name = "DIR")]
    pub vsock: Option<PathBuf>,
    /// How the guest reaches its devices: `pci` if not said, or `mmio` where there are none but the
    /// agent's, whose drivers load sooner.
    #[arg(long, value_enum, value_name = "T")]
    pub transport: Option<Transport>,
}

/// How the guest reaches its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// As functions on a PCI bus, with MSI-X.
    #[default]
    Pci,
    /// As memory-mapped devices that ACPI lists; at most eight.
    Mmio,
}

/// One `--pmem`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmemArg {
    file: PathBuf,
    read_only: bool,
}

impl FromStr for PmemArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (file, read_only) = match text.split_once(',') {
            None => (text, false),
            Some((file, "ro")) => (file, true),
            Some((_, other)) => return Err(format!("`{other}` is not known: want ro")),
        };
        let file = Some(file).filter(|file| !file.is_empty()).ok_or("which file?")?;
        Ok(Self { file: file.into(), read_only })
    }
}

impl PmemArg {
    fn open(&self) -> Result<Pmem, Failure> {
        let open = if self.read_only { Pmem::read_only_file } else { Pmem::file };
        Ok(open(&self.file)?)
    }
}

/// `--net`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetArg {
    /// No card.
    #[default]
    None,
    /// The host's network through a passt process.
    Passt,
    /// A tap interface.
    Tap(String),
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "passt" => Ok(Self::Passt),
            Some(("tap", name)) if !name.is_empty() => Ok(Self::Tap(name.into())),
            _ => Err(format!("`{text}` is no network: want passt, tap:NAME or none")),
        }
    }
}

impl std::fmt::Display for NetArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Passt => f.write_str("passt"),
            Self::Tap(name) => write!(f, "tap:{name}"),
        }
    }
}

/// A machine's builder to which virtio devices are added on one transport.
pub struct Plugs {
    builder: VmBuilder,
    host: Option<PciHost>,
}

impl Plugs {
    /// Adds to `builder`.
    pub fn new(builder: VmBuilder, transport: Transport) -> Self {
        Self { builder, host: (transport == Transport::Pci).then(PciHost::new) }
    }

    /// Adds `device`.
    #[must_use]
    pub fn plug(self, device: impl VirtioDevice + 'static) -> Self {
        match self.host {
            Some(host) => Self { host: Some(host.function(Pci::new(device))), ..self },
            None => Self { builder: self.builder.device(Mmio::new(device)), host: None },
        }
    }

    /// The builder with all devices.
    pub fn finish(self) -> VmBuilder {
        match self.host {
            Some(host) => self.builder.device(host),
            None => self.builder,
        }
    }
}

impl Transport {
    /// The kernel module that drives it.
    pub fn module(self) -> &'static str {
        match self {
            Self::Pci => "virtio_pci",
            Self::Mmio => "virtio_mmio",
        }
    }
}

impl Devices {
    /// True if none was asked for.
    pub fn is_empty(&self) -> bool {
        self.disk.is_empty()
            && self.pmem.is_empty()
            && self.net == NetArg::None
            && self.vsock.is_none()
    }

    fn transport(&self) -> Transport {
        let unsaid = if self.is_empty() { Transport::Mmio } else { Transport::Pci };
        self.transport.unwrap_or(unsaid)
    }

    /// The kernel modules that drive them, and with `agent` the socket device that it needs.
    pub fn modules(&self, agent: bool) -> Vec<&'static str> {
        let has_vsock = agent || self.vsock.is_some();
        let mut names = Vec::new();
        if has_vsock || !self.is_empty() {
            names.push(self.transport().module());
        }
        if !self.is_empty() {
            names.push("virtio_rng");
        }
        if !self.disk.is_empty() {
            names.extend(["virtio_blk", "ext4"]);
        }
        if !self.pmem.is_empty() {
            names.extend(["virtio_pmem", "nd_pmem", "ext4"]);
        }
        if self.net != NetArg::None {
            names.push("virtio_net");
        }
        if has_vsock {
            names.push("vmw_vsock_virtio_transport");
        }
        names
    }

    /// What the guest should do about its network.
    pub fn network(&self) -> Network {
        match self.net {
            NetArg::None => Network::Untouched,
            NetArg::Passt => Network::Dhcp,
            NetArg::Tap(_) => Network::DhcpLater,
        }
    }

    /// Adds them to `builder`, and with them an entropy device. With `agent` there is a socket device
    /// where the guest's agent is listened for. The helper programs end when they are dropped.
    ///
    /// # Errors
    /// [`Failure`] if one cannot be had.
    pub fn plug(
        &self,
        mut builder: VmBuilder,
        agent: bool,
    ) -> Result<(VmBuilder, Option<Passt>), Failure> {
        let mut vsock = self.socket_device(agent)?;
        if let Some(vsock) = vsock.as_mut().filter(|_| agent) {
            builder = builder.guest_agent(vsock);
        }
        if self.is_empty() && vsock.is_none() {
            return Ok((builder, None));
        }
        let mut plugs = Plugs::new(builder, self.transport());
        if !self.is_empty() {
            plugs = plugs.plug(Rng::new());
        }
        for (number, disk) in self.disk.iter().enumerate() {
            plugs = plugs.plug(disk.open()?.named(format!("block{number}")));
        }
        for (number, memory) in self.pmem.iter().enumerate() {
            plugs = plugs.plug(memory.open()?.named(format!("pmem{number}")));
        }
        let mut helper = None;
        match &self.net {
            NetArg::None => {}
            NetArg::Passt => {
                let (passt, socket) = Passt::start()?;
                plugs = plugs.plug(Net::stream(socket)?);
                helper = Some(passt);
            }
            NetArg::Tap(name) => {
                plugs = plugs.plug(Net::tap(name)?);
            }
        }
        if let Some(vsock) = vsock {
            plugs = plugs.plug(vsock);
        }
        Ok((plugs.finish(), helper))
    }

    fn socket_device(&self, agent: bool) -> Result<Option<Vsock>, Failure> {
        if self.vsock.is_none() && !agent {
            return Ok(None);
        }
        let mut vsock = Vsock::new(GUEST_CID)?;
        if let Some(directory) = &self.vsock {
            vsock = vsock.sockets(directory.join("vsock.sock"))?;
        }
        Ok(Some(vsock))
    }
}

/// A passt process, which gives one network card the host's network without privileges.
#[derive(Debug)]
pub struct Passt(Child);

impl Passt {
    /// Starts one. The socket is its card's.
    ///
    /// # Errors
    /// [`Failure`] if it is not installed or cannot be started.
    pub fn start() -> Result<(Self, UnixStream), Failure> {
        let (ours, theirs) = UnixStream::pair().map_err(Failure::host("a pair of sockets"))?;
        let child = Command::new("passt")
            .args(["--foreground", "--quiet", "--one-off", "--fd", "0"])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Failure::host("passt (Debian: apt-get install passt)"))?;
        Ok((Self(child), ours))
    }

    /// True once it has ended, which it does by itself where the host does not let it work.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended when its socket closed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_read_as_they_print() {
        for text in ["none", "passt", "tap:vm0"] {
            assert_eq!(text.parse::<NetArg>().map(|net| net.to_string()), Ok(text.into()));
        }
        for bad in ["", "tap", "tap:", "bridge:br0"] {
            assert!(bad.parse::<NetArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn persistent_memory_is_a_file_and_may_be_read_only() {
        let writable = PmemArg { file: "a b".into(), read_only: false };
        assert_eq!("a b".parse(), Ok(writable.clone()));
        assert_eq!("a b,ro".parse(), Ok(PmemArg { read_only: true, ..writable }));
        for bad in ["", ",ro", "x,rw", "x,ro,ro"] {
            assert!(bad.parse::<PmemArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_machine_without_devices_needs_no_modules() {
        assert!(Devices::default().modules(false).is_empty());
        let pmem = Devices { pmem: vec!["x,ro".parse().unwrap()], ..Devices::default() };
        assert_eq!(pmem.modules(false)[2..], ["virtio_pmem", "nd_pmem", "ext4"]);
        let with_disk = Devices { disk: vec!["x".parse().unwrap()], ..Devices::default() };
        assert_eq!(with_disk.modules(false), ["virtio_pci", "virtio_rng", "virtio_blk", "ext4"]);
    }

    #[test]
    fn an_agent_alone_brings_few_modules_and_none_that_was_not_chosen() {
        let alone = Devices::default();
        assert_eq!(alone.modules(true), ["virtio_mmio", "vmw_vsock_virtio_transport"]);
        let chosen = Devices { transport: Some(Transport::Pci), ..Devices::default() };
        assert_eq!(chosen.modules(true), ["virtio_pci", "vmw_vsock_virtio_transport"]);
    }
}

//! A userland of one file: busybox, and an `/init` that loads kernel modules and then runs a shell
//! or one command, or hands over to the system on a disk.
//!
//! Reports to the host go through the second serial port, so that the console carries nothing but
//! what the guest has to say: `init` when `/init` runs, `exit N` with the status at its end.

use vmkit::boot::Initramfs;
use vmkit::guest::AGENT;

use crate::modules::Module;

/// What `/init` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// An interactive shell on the console, of this many rows and columns if they are known.
    Shell(Option<(u16, u16)>),
    /// One command for `sh -c`, with nothing to read and its output on the console.
    Run(String),
    /// The same through the guest's agent, which the host asks for [`COMMAND`]; as [`Run`](Self::Run) in
    /// a guest without a socket device. Never twice: a guest whose agent dies powers off.
    Serve(String),
    /// The system on the disk that `root=` on the kernel's command line names.
    Disk,
}

/// Where the archive holds the command of [`Job::Run`] and [`Job::Serve`], for `sh`.
pub const COMMAND: &str = "/vmkit/command";

/// How to power the guest off for `sh`, without the kernel's last word and not before the console has
/// said all: setting a terminal's mode waits for that.
pub const POWER_OFF: &str = "\
echo 0 >/proc/sys/kernel/printk
stty -F /dev/ttyS0 sane
poweroff -f
";

/// How `/init` sets up the first network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// Not at all.
    #[default]
    Untouched,
    /// By DHCP, before the job begins.
    Dhcp,
    /// By DHCP beside the job: nobody may answer.
    DhcpLater,
}

/// What the archive holds.
#[derive(Clone, Debug)]
pub struct Userland<'a> {
    /// A statically linked busybox.
    pub busybox: &'a [u8],
    /// What `/init` does.
    pub job: Job,
    /// What it loads before, in this order.
    pub modules: &'a [Module],
    /// What it does about the network.
    pub network: Network,
}

/// The archive of a userland without modules.
pub fn build(busybox: &[u8], job: &Job) -> Vec<u8> {
    let (job, network) = (job.clone(), Network::default());
    Userland { busybox, job, modules: &[], network }.build()
}

impl Userland<'_> {
    /// The archive.
    pub fn build(&self) -> Vec<u8> {
        let mut archive = Initramfs::new();
        for directory in
            ["/bin", "/dev", "/etc", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp", "/vmkit"]
        {
            archive = archive.dir(directory);
        }
        archive = archive
            .device("/dev/console", 5, 1)
            .file("/bin/busybox", 0o755, self.busybox)
            .symlink("/bin/sh", "busybox")
            .file("/etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")
            .file("/vmkit/lease", 0o755, LEASE.as_bytes())
            .file("/init", 0o755, self.init().as_bytes());
        for module in self.modules {
            archive = archive.file(&path(module), 0o644, &module.bytes);
        }
        if let Job::Run(command) | Job::Serve(command) = &self.job {
            archive = archive.file(COMMAND, 0o644, format!("{command}\n").as_bytes());
        }
        if let Job::Serve(_) = self.job {
            archive = archive.file("/vmkit/agent", 0o755, AGENT);
        }
        archive.finish()
    }

    fn init(&self) -> String {
        let modules: String =
            self.modules.iter().map(|module| format!("insmod {}\n", path(module))).collect();
        let network = match self.network {
            Network::Untouched => String::new(),
            Network::Dhcp => format!("{CARD}{DHCP}\n"),
            Network::DhcpLater => format!("{CARD}{DHCP} &\n"),
        };
        let job = match &self.job {
            Job::Shell(size) => shell(*size),
            Job::Run(_) => RUN.to_owned(),
            Job::Serve(_) => format!("{SERVE}{POWER_OFF}fi\n{RUN}"),
            Job::Disk => DISK.to_owned(),
        };
        // A kernel that powers off says so even at the lowest level but none.
        let hush = match self.job {
            Job::Run(_) | Job::Serve(_) => "echo 0 >/proc/sys/kernel/printk\n",
            _ => "",
        };
        // Setting a terminal's mode waits until its output is out, which a power-off would not.
        format!(
            "#!/bin/busybox sh\n\
             /bin/busybox --install -s /bin\n\
             export PATH=/bin HOME=/root TERM=${{TERM:-vt100}}\n\
             mount -t proc proc /proc\n\
             mount -t sysfs sysfs /sys\n\
             mount -t devtmpfs devtmpfs /dev 2>/dev/null\n\
             mkdir -p /dev/pts\n\
             ln -s /proc/self/fd /dev/fd\n\
             ln -s fd/0 /dev/stdin\n\
             ln -s fd/1 /dev/stdout\n\
             ln -s fd/2 /dev/stderr\n\
             mount -t devpts devpts /dev/pts\n\
             stty -F /dev/ttyS1 raw -echo\n\
             exec 3>/dev/ttyS1\n\
             echo init >&3\n\
             hostname vmkit\n\
             cd /root\n\
             {modules}\
             {network}\
             {job}\
             echo exit $? >&3\n\
             {hush}\
             stty -F /dev/ttyS0 sane\n\
             exec 3>&-\n\
             poweroff -f\n"
        )
    }
}

/// Where the archive holds a module.
fn path(module: &Module) -> String {
    format!("/vmkit/{}.ko", module.name)
}

// The console passes bytes on as they are: no carriage returns, no echo.
const RUN: &str = "\
stty -F /dev/ttyS0 raw -echo
sh /vmkit/command </dev/null
";

/// The agent serves until the host powers the machine off; its status 1 says that the kernel lacks what
/// it needs. If it ends in another way, it may have run the command already, and what follows is done.
const SERVE: &str = "\
set -- /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*
status=1
[ ! -e $1 ] || { /vmkit/agent; status=$?; }
if [ $status != 1 ]; then
";

const CARD: &str = "ip link set lo up\nip link set eth0 up\n";
const DHCP: &str = "udhcpc -q -n -O mtu -t 5 -T 1 -i eth0 -s /vmkit/lease >/dev/null 2>&1";

/// What udhcpc calls with the addresses that it was given.
const LEASE: &str = "\
#!/bin/sh
[ \"$1\" = bound ] || exit 0
[ -z \"$mtu\" ] || ip link set $interface mtu $mtu
ip addr add $ip/$mask dev $interface
[ -z \"$router\" ] || ip route add default via ${router%% *} dev $interface
for server in $dns; do echo nameserver $server; done >/etc/resolv.conf
";

/// Reads the words of the command line that a kernel without an initial RAM file system would heed,
/// mounts the disk and becomes its first program.
const DISK: &str = "\
root= init=/sbin/init type= mode=ro
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    init=*) init=${word#init=} ;;
    rootfstype=*) type=\"-t ${word#rootfstype=}\" ;;
    ro | rw) mode=$word ;;
    esac
done
case $root in UUID=* | LABEL=*) root=$(findfs $root) ;; esac
if mount $type -o $mode $root /mnt; then
    for place in dev proc sys; do
        mount --move /$place /mnt/$place || umount -l /$place
    done
    exec 3>&-
    exec switch_root /mnt $init
fi
echo \"/init: cannot mount $root\"
false
";

fn shell(size: Option<(u16, u16)>) -> String {
    let (rows, columns) = size.unwrap_or((24, 80));
    format!(
        "stty -F /dev/ttyS0 rows {rows} cols {columns}\n\
         echo 'Welcome. Leave with exit, or with Ctrl-A x.'\n\
         setsid cttyhack sh\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_travels_as_it_is() {
        let command = "echo \"a'b\" $HOME; exit 7";
        let archive = build(b"\x7fELF", &Job::Run(command.into()));
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains(command));
        assert!(text.contains("sh /vmkit/command </dev/null\necho exit $? >&3\n"));
    }

    #[test]
    fn a_shell_knows_the_terminals_size() {
        let archive = build(b"\x7fELF", &Job::Shell(Some((24, 80))));
        assert!(String::from_utf8_lossy(&archive).contains("rows 24 cols 80"));
    }

    #[test]
    fn modules_are_loaded_in_their_order_before_the_network() {
        let module = |name: &str| Module { name: name.into(), bytes: b"\x7fELF".into() };
        let modules = [module("ring"), module("card")];
        let job = Job::Shell(None);
        let network = Network::Dhcp;
        let archive = Userland { busybox: b"", job, modules: &modules, network }.build();
        let text = String::from_utf8_lossy(&archive);
        let wanted = "insmod /vmkit/ring.ko\ninsmod /vmkit/card.ko\nip link set lo up\n";
        assert!(text.contains(wanted), "{text}");
    }
}

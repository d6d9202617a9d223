"""What is in the testbed's guest: Debian's stock kernel, busybox, and the files to be run.

Fetches packages with `apt-get download`, once; never installs anything.
"""

import glob
import gzip
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
CACHE = os.path.join(TARGET, "kvm-testbed")

# What the guest prints on its second serial port around the command's output.
STARTED = "vmkit-testbed: started"
ENDED = "vmkit-testbed: status "

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs none /dev/shm
ln -s /proc/self/fd /dev/fd
ip link set lo up
stty -F /dev/ttyS1 raw -echo
for module in $(cat /modules); do
    insmod "$module" || echo "testbed: insmod $module failed"
done
[ -c /dev/kvm ] || echo "testbed: no /dev/kvm"
exec </dev/null >/dev/ttyS1 2>&1
echo "$STARTED"
sh /command
status=$?
echo
echo "$ENDED$status"
sync
sleep 0.2
poweroff -f
"""


class Broken(Exception):
    """The testbed itself failed."""


def say(text):
    print(f"kvm-testbed: {text}", file=sys.stderr, flush=True)


def fetch(package, into):
    """The .deb of `package`, from $VMKIT_TESTBED_DEBS, the cache, or the archive."""

    def there():
        given = os.environ.get("VMKIT_TESTBED_DEBS")
        for place in filter(None, [given, into]):
            if found := sorted(glob.glob(os.path.join(place, f"{package}_*.deb"))):
                return found[-1]
        return None

    def download():
        say(f"downloading {package}")
        subprocess.run(["apt-get", "download", package], cwd=into, stdout=subprocess.DEVNULL, check=False)
        return there()

    return there() or with_fresh_lists(download, f"cannot download the Debian package {package}")


def kernel_package():
    """The package that linux-image-cloud-amd64 stands for."""
    if given := os.environ.get("VMKIT_TESTBED_DEBS"):
        for path in sorted(glob.glob(os.path.join(given, "linux-image-*-cloud-amd64_*.deb")), reverse=True):
            return os.path.basename(path).split("_")[0]

    def ask():
        shown = subprocess.run(
            ["apt-cache", "depends", "linux-image-cloud-amd64"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", shown.stdout)
        return found and found.group(1)

    return with_fresh_lists(ask, "apt knows no linux-image-cloud-amd64")


def with_fresh_lists(ask, failure):
    """What `ask` says; if nothing, what it says once apt's lists are fresh."""
    if answer := ask():
        return answer
    if os.geteuid() == 0:
        say("fetching apt's package lists")
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        if answer := ask():
            return answer
    raise Broken(f"{failure} (is `apt-get update` due?)")


def unpack(deb, into):
    """Unpacks `deb` once."""
    mark = os.path.join(into, ".complete")
    if not os.path.exists(mark):
        shutil.rmtree(into, ignore_errors=True)
        os.makedirs(into)
        if subprocess.run(["dpkg-deb", "-x", deb, into], check=False).returncode != 0:
            raise Broken(f"cannot unpack {deb}")
        open(mark, "w").close()
    return into


def module_text(path):
    """A module as the kernel takes it: uncompressed."""
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".xz"):
        import lzma

        return lzma.decompress(data)
    if path.endswith(".gz"):
        return gzip.decompress(data)
    return data


def modules(tree, name):
    """`name` and what it depends on, in the order of loading: (name, contents)."""
    paths = {}
    for path in glob.glob(os.path.join(tree, "**", "*.ko*"), recursive=True):
        paths[os.path.basename(path).split(".ko")[0].replace("-", "_")] = path
    order = []

    def visit(module):
        if module in (done for done, _ in order):
            return
        if module not in paths:
            raise Broken(f"the kernel package has no module {module}")
        data = module_text(paths[module])
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in filter(None, (found.group(1).decode() if found else "").split(",")):
            visit(other.replace("-", "_"))
        order.append((module, data))

    visit(name)
    return order


def prepare():
    """The kernel, its tree, and busybox."""
    if not shutil.which("qemu-system-x86_64"):
        raise Broken("there is no qemu-system-x86_64 (Debian: apt-get install qemu-system-x86)")
    debs = os.path.join(CACHE, "debs")
    os.makedirs(debs, exist_ok=True)
    package = kernel_package()
    try:
        deb = fetch(package, debs)
    except Broken:
        # apt's lists were old when they named it, and are fresh now.
        renewed = kernel_package()
        if renewed == package:
            raise
        package, deb = renewed, fetch(renewed, debs)
    tree = unpack(deb, os.path.join(CACHE, package))
    kernels = glob.glob(os.path.join(tree, "boot", "vmlinuz-*"))
    busybox = unpack(fetch("busybox-static", debs), os.path.join(CACHE, "busybox-static"))
    busyboxes = glob.glob(os.path.join(busybox, "**", "bin", "busybox"), recursive=True)
    if not kernels or not busyboxes:
        raise Broken("the Debian packages hold no kernel or no busybox")
    return kernels[0], tree, busyboxes[0]


def stock_guest(drivers):
    """Files that are a kernel with `drivers` and a busybox, installed: what our whole-machine tests boot in the guest."""
    kernel, tree, busybox = prepare()
    version = os.path.basename(kernel).removeprefix("vmlinuz-")
    home = next(place for place in [f"{tree}/lib/modules", f"{tree}/usr/lib/modules"] if os.path.isdir(place))
    files = [
        f"{kernel}:/boot/vmlinuz-{version}",
        f"{busybox}:/bin/busybox",
        f"{home}/{version}/modules.builtin:/lib/modules/{version}/modules.builtin",
    ]
    folder = os.path.join(CACHE, "modules", version)
    os.makedirs(folder, exist_ok=True)
    for name, data in {module for driver in drivers for module in modules(tree, driver)}:
        path = os.path.join(folder, f"{name}.ko")
        with open(path, "wb") as file:
            file.write(data)
        files.append(f"{path}:/lib/modules/{version}/{name}.ko")
    return files


def stripped(program):
    """A copy of `program` without what only a debugger needs: the guest unpacks it more quickly."""
    folder = os.path.join(CACHE, "programs")
    os.makedirs(folder, exist_ok=True)
    copy = os.path.join(folder, os.path.basename(program))
    done = None
    if shutil.which("strip"):
        done = subprocess.run(["strip", "--strip-debug", "-o", copy, program], check=False)
    if done is None or done.returncode != 0:
        shutil.copy(program, copy)
    return copy


class Archive:
    """A cpio archive in the "newc" format (Linux, Documentation/driver-api/early-userspace)."""

    def __init__(self):
        self.parts = []
        self.names = set()

    def add(self, name, mode, data=b""):
        name = name.strip("/")
        if name in self.names:
            return
        parent = os.path.dirname(name)
        if parent:
            self.add(parent, stat.S_IFDIR | 0o755)
        self.names.add(name)
        self._entry(name, mode, data)

    def _entry(self, name, mode, data):
        path = name.encode() + b"\0"
        fields = [len(self.names), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self.parts += [header, path, bytes(-(len(header) + len(path)) % 4)]
        self.parts += [data, bytes(-len(data) % 4)]

    def add_file(self, here, there):
        """The file at `here`; a link is followed."""
        with open(here, "rb") as file:
            mode = stat.S_IFREG | (0o755 if os.access(here, os.X_OK) else 0o644)
            self.add(there, mode, file.read())

    def add_program(self, here, there):
        """A file, and the shared libraries it names if it is a program."""
        self.add_file(here, there)
        with open(here, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return
        shown = subprocess.run(
            ["ldd", here], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
        if shown.returncode != 0:
            return
        for found in re.finditer(r"(/\S+) \(0x", shown.stdout):
            self.add_file(found.group(1), found.group(1))

    def write(self, path):
        self._entry("TRAILER!!!", 0, b"")
        with open(path, "wb") as file:
            file.write(b"".join(self.parts))


def build_initramfs(path, tree, busybox, command, files=(), env=()):
    """Writes the archive: busybox, kvm-amd, `files` (HERE or HERE:THERE), and `command`, which may be one of them."""
    archive = Archive()
    for name in ["dev", "proc", "sys", "tmp", "root", "sbin", "usr/bin", "usr/sbin", "var/tmp"]:
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600)
    archive.add_file(busybox, "bin/busybox")
    init = INIT.replace("$STARTED", STARTED).replace("$ENDED", ENDED)
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    order = modules(tree, "kvm_amd")
    for name, data in order:
        archive.add(f"lib/modules/{name}.ko", stat.S_IFREG | 0o644, data)
    names = "".join(f"/lib/modules/{name}.ko\n" for name, _ in order)
    archive.add("modules", stat.S_IFREG | 0o644, names.encode())
    for pair in files:
        here, _, there = pair.partition(":")
        archive.add_program(here, os.path.abspath(there or here))
    command = list(command)
    if "/" in command[0] and os.path.isfile(command[0]):
        command[0] = os.path.abspath(command[0])
        archive.add_program(command[0], command[0])
    lines = [f"export {shlex.quote(pair)}" for pair in env]
    lines += ["cd /tmp", "exec " + shlex.join(command), ""]
    archive.add("command", stat.S_IFREG | 0o755, "\n".join(lines).encode())
    archive.write(path)

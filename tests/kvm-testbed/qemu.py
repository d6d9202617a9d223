"""Runs the testbed's guest in QEMU, and ends it when it hangs.

QEMU's emulation was seen to stop dead now and then, on busy hosts above all: every run is bounded,
as a whole and in how long it may print nothing.
"""

import fcntl
import os
import re
import subprocess
import sys
import threading
import time

from guest import CACHE, ENDED, STARTED, build_initramfs, prepare, say

TIMED_OUT = 124
BROKEN = 125


class Options:
    """How a guest runs."""

    cpus = 2
    memory = 2048
    # Seconds for all of it, until the command starts, and without output from it.
    timeout = 240
    boot_timeout = 240
    idle_timeout = None
    icount = False


def qemu_command(options, kernel, initramfs, console):
    accelerator = ["-accel", "tcg,thread=multi"]
    cpus = options.cpus
    if options.icount:
        # Time is the number of instructions: figures repeat, whatever else this machine does.
        accelerator = ["-accel", "tcg", "-icount", "shift=0,sleep=off"]
        cpus = 1
    return [
        "qemu-system-x86_64",
        *accelerator,
        "-cpu", "EPYC,+svm",
        "-smp", str(cpus),
        "-m", f"{options.memory}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{console}",
        "-serial", "stdio",
        "-kernel", kernel,
        "-initrd", initramfs,
        "-append", "console=ttyS0 panic=-1 mitigations=off tsc=reliable quiet",
    ]  # fmt: skip


class Output:
    """The command's output as it comes, out of what the guest prints around it."""

    def __init__(self, take):
        self.take = take
        self.started = threading.Event()
        self.last = time.monotonic()

    def follow(self, source):
        """Passes the output from `source` to `take`; the command's status, if it ended."""
        first = f"{STARTED}\n".encode()
        # The line feed before it is the guest's own: the command's last line need not have one.
        last = f"\n{ENDED}".encode()
        text = b""
        while chunk := os.read(source, 65536):
            self.last = time.monotonic()
            text += chunk
            if not self.started.is_set():
                if first not in text:
                    continue
                text = text.split(first, 1)[1]
                self.started.set()
            output, found, rest = text.partition(last)
            if found and b"\n" in rest:
                self.take(output)
                return int(rest.split(b"\n", 1)[0])
            # What may be the beginning of the status has to wait.
            keep = len(text) - text.rfind(last) if found else next(
                n for n in range(min(len(last), len(text)), -1, -1) if text.endswith(last[:n])
            )
            self.take(text[: len(text) - keep])
            text = text[len(text) - keep :]
        if self.started.is_set():
            self.take(text)
        return None


def write_out(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def run_once(options, command, console, take):
    """The command's status, or None if it did not end in time."""
    with open(os.path.join(CACHE, "qemu.log"), "w") as log:
        # What TCG lacks of an EPYC is listed there at each start.
        qemu = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
    output = Output(take)
    start = time.monotonic()
    status = None

    def is_late():
        now = time.monotonic()
        if not output.started.is_set():
            return now - start > min(options.boot_timeout, options.timeout)
        idle = options.idle_timeout
        return now - start > options.timeout or (idle and now - output.last > idle)

    def watch():
        while qemu.poll() is None:
            if is_late():
                qemu.kill()
                return
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = output.follow(qemu.stdout.fileno())
        if status is not None:
            try:
                qemu.wait(10)
            except subprocess.TimeoutExpired:
                pass
    finally:
        if qemu.poll() is None:
            qemu.kill()
        qemu.wait()
        watcher.join()
    if status is None and not output.started.is_set():
        say("the guest did not start; the end of QEMU's messages and of its console:")
        for path in [os.path.join(CACHE, "qemu.log"), console]:
            try:
                with open(path, errors="replace") as file:
                    sys.stderr.write("".join(file.readlines()[-15:]))
            except OSError:
                pass
    return status


def run(options, command, files=(), env=(), take=write_out):
    """Runs `command` in a fresh guest, once. Its status, or None if it did not end in time."""
    os.makedirs(CACHE, exist_ok=True)
    # One guest at a time: two would only make each other miss their deadlines.
    with open(os.path.join(CACHE, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel, tree, busybox = prepare()
        initramfs = os.path.join(CACHE, "initramfs.cpio")
        console = os.path.join(CACHE, "console.log")
        build_initramfs(initramfs, tree, busybox, command, files, env)
        start = time.monotonic()
        qemu = qemu_command(options, kernel, initramfs, console)
        status = run_once(options, qemu, console, take)
        took = time.monotonic() - start
        say(f"no end in {took:.0f} s" if status is None else f"status {status} after {took:.1f} s")
        return status


def built_programs(cargo):
    """Runs a `cargo` command that builds test or bench programs: their paths by target name."""
    done = subprocess.run(
        ["cargo", *cargo], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    found = re.findall(r"^ *Executable.*\((.*?([^/]*)-[0-9a-f]+)\)$", done.stderr, re.MULTILINE)
    return {name: os.path.abspath(path) for path, name in found}

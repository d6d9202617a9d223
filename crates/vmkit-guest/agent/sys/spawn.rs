//! Making a process that executes a program.

use core::convert::Infallible;

use super::call::{call, exit, number};
use super::file::{self, Fd, flag};
use super::linux::set_size;
use super::process::{Environment, set_mask};
use crate::protocol::{Exec, Failure, MAX_STRINGS, Step, flags};
use crate::service::{Errno, Spawned};

/// Entries of the agent's own environment that are passed on at most.
const MOST_INHERITED: usize = 512;
/// Where programs are if nobody says.
const DEFAULT_PATH: &[u8] = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\0";

const ENOENT: Errno = Errno(2);
const EACCES: Errno = Errno(13);
const ENOTDIR: Errno = Errno(20);
const ENAMETOOLONG: Errno = Errno(36);

/// Strings as the kernel wants them: addresses, then zero.
struct Table<const N: usize> {
    strings: [usize; N],
    len: usize,
}

impl<const N: usize> Table<N> {
    const EMPTY: Self = Self { strings: [0; N], len: 0 };

    /// Appends a string that ends with a zero byte and outlives the table. What finds no room
    /// beside the last zero is left out.
    fn push(&mut self, string: &[u8]) {
        if self.len + 1 < N
            && string.last() == Some(&0)
            && let Some(slot) = self.strings.get_mut(self.len)
        {
            *slot = string.as_ptr() as usize;
            self.len += 1;
        }
    }

    fn address(&self) -> usize {
        self.strings.as_ptr() as usize
    }
}

/// The three standard descriptors of the new process, and the agent's ends of them.
#[derive(Default)]
struct Ends {
    theirs: [Option<Fd>; 3],
    ours: [Option<Fd>; 3],
}

/// The name in `NAME=value\0` or `NAME\0`.
fn name(entry: &[u8]) -> &[u8] {
    entry.split(|&byte| byte == b'=' || byte == 0).next().unwrap_or(entry)
}

/// The environment of the new process.
fn environment<'a>(
    exec: &Exec<'a>,
    own: Environment,
) -> impl Iterator<Item = &'a [u8]> + Clone + 'a {
    let clear = exec.has(flags::CLEAR_ENVIRONMENT);
    let asked = exec.environment();
    let own = own.strings().take(if clear { 0 } else { MOST_INHERITED });
    let own = own.map(|entry| -> &'a [u8] { entry });
    let fallback =
        (!clear && own.clone().all(|entry| name(entry) != b"PATH")).then_some(DEFAULT_PATH);
    let others = asked.clone();
    own.chain(fallback)
        .filter(move |entry| others.clone().all(|other| name(other) != name(entry)))
        .chain(asked.filter(|entry| entry.contains(&b'=')))
}

pub(super) fn spawn(exec: &Exec<'_>, own: Environment) -> Result<Spawned<Fd>, Failure> {
    let at = |step| move |errno: Errno| Failure { step, errno: errno.0 };
    let mut arguments = Table::<{ MAX_STRINGS + 1 }>::EMPTY;
    exec.arguments().for_each(|argument| arguments.push(argument));
    let mut entries = Table::<{ MAX_STRINGS + MOST_INHERITED + 2 }>::EMPTY;
    environment(exec, own).for_each(|entry| entries.push(entry));
    let path = environment(exec, own).find(|entry| name(entry) == b"PATH");
    let path = path.unwrap_or(DEFAULT_PATH).strip_prefix(b"PATH=").unwrap_or(b"");

    let terminal = exec.has(flags::TERMINAL);
    let ends = if terminal {
        open_terminal(exec).map_err(at(Step::Terminal))
    } else {
        open_pipes(exec).map_err(at(Step::Pipe))
    }?;
    let (verdict, word) = file::pipe().map_err(at(Step::Pipe))?;
    file::set_nonblocking(&verdict).map_err(at(Step::Pipe))?;
    // SAFETY: this process has one thread, and the new one leaves this function only by executing
    // or exiting; until then it makes system calls and uses its own copy of memory.
    let process = unsafe { call(number::FORK, []) }.map_err(at(Step::Fork))?;
    if process == 0 {
        let child =
            Child { exec, path, arguments: arguments.address(), entries: entries.address() };
        let Err(Failure { step, errno }) = child.run(&ends.theirs, terminal);
        let [e0, e1] = errno.to_le_bytes();
        // The agent is there to read it, or nobody cares.
        let _ = file::write(&word, &[step as u8, e0, e1]);
        exit(127);
    }
    let [input, output, error] = ends.ours;
    Ok(Spawned { process: process as u32, verdict, input, output, error, terminal })
}

fn open_pipes(exec: &Exec<'_>) -> Result<Ends, Errno> {
    let mut ends = Ends::default();
    for (index, flag) in [flags::INPUT, flags::OUTPUT, flags::ERROR].into_iter().enumerate() {
        let (theirs, ours) = if !exec.has(flag) {
            (file::open(b"/dev/null\0", flag::READ_WRITE, 0)?, None)
        } else {
            let (read, write) = file::pipe()?;
            let (theirs, ours) = if flag == flags::INPUT { (read, write) } else { (write, read) };
            file::set_nonblocking(&ours)?;
            (theirs, Some(ours))
        };
        if let (Some(their_slot), Some(our_slot)) =
            (ends.theirs.get_mut(index), ends.ours.get_mut(index))
        {
            (*their_slot, *our_slot) = (Some(theirs), ours);
        }
    }
    Ok(ends)
}

/// A new terminal (Linux, Documentation/filesystems/devpts.rst).
fn open_terminal(exec: &Exec<'_>) -> Result<Ends, Errno> {
    const UNLOCK: usize = 0x4004_5431;
    const NUMBER: usize = 0x8004_5430;
    let open = |path| file::open(path, flag::READ_WRITE | flag::NONBLOCK, 0);
    let master = open(b"/dev/ptmx\0").or_else(|_| open(b"/dev/pts/ptmx\0"))?;
    let (locked, mut number) = (0_i32, 0_u32);
    // SAFETY: the kernel reads one number.
    unsafe { call(number::IOCTL, [master.number(), UNLOCK, &raw const locked as usize]) }?;
    // SAFETY: the kernel writes one number.
    unsafe { call(number::IOCTL, [master.number(), NUMBER, &raw mut number as usize]) }?;
    let mut path = *b"/dev/pts/\0\0\0\0\0\0\0\0\0\0\0";
    write_number(number, &mut path[b"/dev/pts/".len()..]);
    let theirs = || file::open(&path, flag::READ_WRITE, 0).map(Some);
    let theirs = [theirs()?, theirs()?, theirs()?];
    set_size(&master, exec.size);
    let input = file::duplicate(master.raw())?;
    Ok(Ends { theirs, ours: [Some(input), Some(master), None] })
}

/// Writes `number` in decimal at the beginning of `into`, which holds ten digits.
fn write_number(number: u32, into: &mut [u8]) {
    let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = number;
    for place in into.iter_mut().take(digits).rev() {
        *place = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
}

/// What the new process does.
struct Child<'a> {
    exec: &'a Exec<'a>,
    path: &'a [u8],
    arguments: usize,
    entries: usize,
}

impl Child<'_> {
    fn run(&self, standard: &[Option<Fd>; 3], terminal: bool) -> Result<Infallible, Failure> {
        let at = |step| move |errno: Errno| Failure { step, errno: errno.0 };
        self.prepare(standard, terminal).map_err(at(Step::Pipe))?;
        let directory = self.exec.directory();
        if directory.len() > 1 {
            // SAFETY: the string ends with a zero byte.
            unsafe { call(number::CHDIR, [directory.as_ptr() as usize]) }
                .map_err(at(Step::Directory))?;
        }
        Err(at(Step::Execute)(self.execute()))
    }

    /// A session of its own, its standard descriptors, and no signal held back.
    fn prepare(&self, standard: &[Option<Fd>; 3], terminal: bool) -> Result<(), Errno> {
        const CONTROLLING_TERMINAL: usize = 0x540E;
        const DEATH_SIGNAL: usize = 1;
        const KILL: usize = 9;
        // SAFETY: the call touches no memory.
        unsafe { call(number::SETSID, []) }?;
        // This process does not outlive the agent; what it starts may.
        // SAFETY: as above.
        unsafe { call(number::PRCTL, [DEATH_SIGNAL, KILL]) }?;
        for (index, fd) in standard.iter().enumerate() {
            if let Some(fd) = fd {
                // SAFETY: as above. Descriptors of the agent are above the three.
                unsafe { call(number::DUP3, [fd.number(), index, 0]) }?;
            }
        }
        if terminal {
            // SAFETY: as above.
            unsafe { call(number::IOCTL, [0, CONTROLLING_TERMINAL, 0]) }?;
        }
        set_mask(0)
    }

    /// Executes the program, wherever it is. Returns why it could not.
    fn execute(&self) -> Errno {
        let program = self.exec.program();
        if program.contains(&b'/') {
            return self.execute_at(program);
        }
        let mut denied = false;
        for directory in self.path.split(|&byte| byte == b':' || byte == 0) {
            let mut place = [0; 4096];
            let parts = [directory, if directory.is_empty() { b"" } else { b"/" }, program];
            let mut len = 0;
            for part in parts {
                let Some(slot) = place.get_mut(len..len + part.len()) else { return ENAMETOOLONG };
                slot.copy_from_slice(part);
                len += part.len();
            }
            match self.execute_at(place.get(..len).unwrap_or(b"\0")) {
                EACCES => denied = true,
                ENOENT | ENOTDIR => {}
                error => return error,
            }
        }
        if denied { EACCES } else { ENOENT }
    }

    fn execute_at(&self, path: &[u8]) -> Errno {
        if path.last() != Some(&0) {
            return ENOENT;
        }
        // SAFETY: all strings end with a zero byte, and the tables with a null pointer.
        let result =
            unsafe { call(number::EXECVE, [path.as_ptr() as usize, self.arguments, self.entries]) };
        result.err().unwrap_or(ENOENT)
    }
}

//! What host and agent say to each other: frames, and the messages in them.
//!
//! Both sides compile this file, the agent without an allocator, so it uses `core` alone and borrows
//! from the bytes it reads. It does no input or output and keeps no state.
//!
//! A frame is eight bytes and a payload. All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | kind of message |
//! | 1 | stream, where the kind has one, else 0 |
//! | 2..4 | length of the payload: every value is valid |
//! | 4..8 | channel: 0 for the connection itself, otherwise chosen by the host |
//!
//! A channel is one command or one file. Its streams carry bytes under credit: who sends may
//! have [`WINDOW`] bytes under way and gets room back with `Credit`, so that a reader who is slow
//! makes neither side buffer more, and holds up no other channel.

use core::fmt;

/// The version that this file describes. A later one keeps the frame and the hello message.
pub const VERSION: u16 = 1;
/// The port on the host that an agent dials if it is not told another.
pub const PORT: u32 = 1028;
/// Bytes of a frame before its payload.
pub const HEADER: usize = 8;
/// Longest payload of a frame.
pub const MAX_PAYLOAD: usize = u16::MAX as usize;
/// Longest piece of a stream in one frame, so that streams take turns.
pub const MAX_PIECE: usize = 32 << 10;
/// Bytes of one stream that may be under way.
pub const WINDOW: u32 = 128 << 10;
/// Channels that an agent keeps at a time.
pub const MAX_CHANNELS: usize = 128;
/// Arguments and environment entries of a command, together.
pub const MAX_STRINGS: usize = 2048;

const MAGIC: [u8; 4] = *b"vmkg";

/// One of a channel's streams. A file that is read uses `Output`, one that is written `Input`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// To the guest.
    Input,
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

impl Stream {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Input,
            1 => Self::Output,
            2 => Self::Error,
            _ => return None,
        })
    }
}

/// What a guest was doing for the host when its kernel said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Finding room for one more command or file.
    Channel,
    /// Making pipes.
    Pipe,
    /// Making a terminal.
    Terminal,
    /// Making a process.
    Fork,
    /// Entering the command's directory.
    Directory,
    /// Executing the program.
    Execute,
    /// Opening a file.
    Open,
    /// Reading or writing a file.
    Transfer,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Channel,
        Self::Pipe,
        Self::Terminal,
        Self::Fork,
        Self::Directory,
        Self::Execute,
        Self::Open,
        Self::Transfer,
    ];

    /// The step that was encoded as `byte`.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Channel => "finding room for it",
            Self::Pipe => "making its pipes",
            Self::Terminal => "making its terminal",
            Self::Fork => "making its process",
            Self::Directory => "entering its directory",
            Self::Execute => "executing it",
            Self::Open => "opening it",
            Self::Transfer => "reading or writing it",
        })
    }
}

/// A failure of the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub step: Step,
    /// Linux's error number.
    pub errno: u16,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It left with a status.
    Code(u8),
    /// A signal ended it.
    Signal(u8),
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Malformed {
    /// A kind of message that this side does not know.
    Kind(u8),
    /// A message that is too short, too long, or says what cannot be.
    Content(u8),
    /// A hello of something else.
    NotAnAgent,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "a message of unknown kind {kind}"),
            Self::Content(kind) => write!(f, "a malformed message of kind {kind}"),
            Self::NotAnAgent => f.write_str("a greeting that is not vmkit's"),
        }
    }
}

/// A frame whose message has not been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Kind of message.
    pub kind: u8,
    /// Stream, as it came.
    pub stream: u8,
    /// Channel.
    pub channel: u32,
    /// The rest.
    pub payload: &'a [u8],
}

/// The frame at the beginning of `bytes` and what follows it; none if it is not all there.
pub fn split_frame(bytes: &[u8]) -> Option<(Frame<'_>, &[u8])> {
    let (&[kind, stream, l0, l1, c0, c1, c2, c3], rest) = bytes.split_first_chunk::<HEADER>()?;
    let (payload, rest) = rest.split_at_checked(u16::from_le_bytes([l0, l1]).into())?;
    let channel = u32::from_le_bytes([c0, c1, c2, c3]);
    Some((Frame { kind, stream, channel, payload }, rest))
}

/// The eight bytes before a payload of `len` bytes.
fn header(kind: u8, stream: u8, channel: u32, len: u16) -> [u8; HEADER] {
    let ([l0, l1], [c0, c1, c2, c3]) = (len.to_le_bytes(), channel.to_le_bytes());
    [kind, stream, l0, l1, c0, c1, c2, c3]
}

/// The header of a piece of `len` bytes of a stream, which the caller puts behind it.
pub fn data_header(stream: Stream, channel: u32, len: u16) -> [u8; HEADER] {
    header(kind::DATA, stream as u8, channel, len)
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    // About streams, both ways.
    pub(super) const DATA: u8 = 16;
    pub(super) const END: u8 = 17;
    pub(super) const CREDIT: u8 = 18;
    pub(super) const CLOSE: u8 = 19;
    // To the guest.
    pub(super) const EXEC: u8 = 32;
    pub(super) const READ: u8 = 33;
    pub(super) const WRITE: u8 = 34;
    pub(super) const SIGNAL: u8 = 35;
    pub(super) const RESIZE: u8 = 36;
    // To the host.
    pub(super) const STARTED: u8 = 64;
    pub(super) const OPENED: u8 = 65;
    pub(super) const FAILED: u8 = 66;
    pub(super) const EXITED: u8 = 67;
    pub(super) const STORED: u8 = 68;
}

/// About one stream of a channel. Both sides say these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow<'a> {
    /// The next bytes.
    Data(&'a [u8]),
    /// There are no more bytes, and the channel will not speak of this stream again.
    End,
    /// Room for so many bytes more.
    Credit(u32),
    /// Nobody reads this stream any more. Who sends it answers with `End`.
    Close,
}

/// What the host says to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToAgent<'a> {
    /// The first message: the version to speak, which is not above the agent's.
    Hello(u16),
    /// Opens the channel: run a command.
    Exec(Exec<'a>),
    /// Opens the channel: send a file.
    Read(&'a [u8]),
    /// Opens the channel: make or replace the contents of a file, which end with the input stream.
    Write {
        /// Permission bits, if the file is new.
        mode: u16,
        /// Where.
        path: &'a [u8],
    },
    /// About a stream.
    Flow(Stream, Flow<'a>),
    /// Signals the command's process group.
    Signal(u8),
    /// The command's terminal has a new size.
    Resize(Size),
}

/// What the agent says to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// The first message: the highest version the agent speaks.
    Hello(u16),
    /// The command runs, under this process number.
    Started(u32),
    /// The file is open; `Output` has its contents.
    Opened {
        /// Its mode bits, with the type of file among them.
        mode: u32,
        /// Its size now.
        size: u64,
    },
    /// It did not come to it, or not to its end. The channel is closed.
    Failed(Failure),
    /// About a stream.
    Flow(Stream, Flow<'a>),
    /// The command has ended; the agent takes no more input for it.
    Exited(Exit),
    /// All contents of a written file are in it. The channel is closed.
    Stored,
}

/// A command. Its strings lie in the payload with a zero byte behind each: directory (empty: the
/// agent's), arguments, environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exec<'a> {
    /// What is asked for, of [`flags`].
    pub flags: u8,
    /// Size of the terminal, if there is one.
    pub size: Size,
    /// How many of the strings are arguments; the program is the first.
    pub arguments: u16,
    /// How many of the strings are environment entries: `NAME=value`, or `NAME` to remove one.
    pub environment: u16,
    /// Directory, arguments, environment, each with its zero byte.
    pub strings: &'a [u8],
}

/// Bits of [`Exec::flags`].
pub mod flags {
    /// The command gets a terminal; it reads and writes it as `Input` and `Output`.
    pub const TERMINAL: u8 = 1;
    /// The command sees none of the agent's environment.
    pub const CLEAR_ENVIRONMENT: u8 = 2;
    /// Standard input is a stream and not `/dev/null`.
    pub const INPUT: u8 = 4;
    /// Standard output is a stream and not `/dev/null`.
    pub const OUTPUT: u8 = 8;
    /// Standard error is a stream and not `/dev/null`.
    pub const ERROR: u8 = 16;
    /// All of them.
    pub(super) const ALL: u8 = TERMINAL | CLEAR_ENVIRONMENT | INPUT | OUTPUT | ERROR;
}

impl<'a> Exec<'a> {
    fn parse(payload: &'a [u8]) -> Option<Self> {
        let (&[flags, r0, r1, c0, c1, a0, a1, e0, e1], strings) = payload.split_first_chunk()?;
        let exec = Self {
            flags,
            size: Size {
                rows: u16::from_le_bytes([r0, r1]),
                columns: u16::from_le_bytes([c0, c1]),
            },
            arguments: u16::from_le_bytes([a0, a1]),
            environment: u16::from_le_bytes([e0, e1]),
            strings,
        };
        exec.is_valid().then_some(exec)
    }

    fn is_valid(&self) -> bool {
        let strings = usize::from(self.arguments) + usize::from(self.environment);
        let zeros = self.strings.iter().filter(|&&byte| byte == 0).count();
        self.flags & !flags::ALL == 0
            && self.arguments > 0
            && strings <= MAX_STRINGS
            && zeros == strings + 1
            && self.strings.last() == Some(&0)
            && self.program().len() > 1
    }

    fn all(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        self.strings.split_inclusive(|&byte| byte == 0)
    }

    /// The directory to run in, with its zero byte.
    pub fn directory(&self) -> &'a [u8] {
        self.all().next().unwrap_or(b"\0")
    }

    /// The program, with its zero byte.
    pub fn program(&self) -> &'a [u8] {
        self.arguments().next().unwrap_or(b"\0")
    }

    /// The arguments, the program first, each with its zero byte.
    pub fn arguments(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        self.all().skip(1).take(self.arguments.into())
    }

    /// The environment entries, each with its zero byte.
    pub fn environment(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        self.all().skip(1 + usize::from(self.arguments)).take(self.environment.into())
    }

    /// True if `flag` of [`flags`] is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A path in a message: not empty, one zero byte, at its end.
fn path(bytes: &[u8]) -> Option<&[u8]> {
    let zero = bytes.iter().position(|&byte| byte == 0)?;
    (zero > 0 && zero + 1 == bytes.len()).then_some(bytes)
}

fn flow<'a>(frame: &Frame<'a>) -> Option<Option<(Stream, Flow<'a>)>> {
    let payload = frame.payload;
    let flow = match frame.kind {
        kind::DATA if !payload.is_empty() => Flow::Data(payload),
        kind::END if payload.is_empty() => Flow::End,
        kind::CLOSE if payload.is_empty() => Flow::Close,
        kind::CREDIT => Flow::Credit(u32::from_le_bytes(payload.try_into().ok()?)),
        kind::DATA | kind::END | kind::CLOSE => return None,
        _ => return Some(None),
    };
    Some(Some((Stream::from_byte(frame.stream)?, flow)))
}

fn hello(payload: &[u8]) -> Result<u16, Malformed> {
    // A later version may say more.
    match payload {
        [m0, m1, m2, m3, v0, v1, ..] if [*m0, *m1, *m2, *m3] == MAGIC => {
            Ok(u16::from_le_bytes([*v0, *v1]))
        }
        _ => Err(Malformed::NotAnAgent),
    }
}

impl<'a> ToAgent<'a> {
    /// Understands a frame of the host.
    ///
    /// # Errors
    /// [`Malformed`] if it is not one of these messages, to the last byte.
    pub fn parse(frame: &Frame<'a>) -> Result<Self, Malformed> {
        let content = Malformed::Content(frame.kind);
        if let Some((stream, flow)) = flow(frame).ok_or(content)? {
            return Ok(Self::Flow(stream, flow));
        }
        let payload = frame.payload;
        let message = match frame.kind {
            kind::HELLO => return hello(payload).map(Self::Hello),
            kind::EXEC => Exec::parse(payload).map(Self::Exec),
            kind::READ => path(payload).map(Self::Read),
            kind::WRITE => payload.split_first_chunk().and_then(|(mode, rest)| {
                let mode = u16::from_le_bytes(*mode);
                Some(Self::Write { mode, path: path(rest)? }).filter(|_| mode <= 0o7777)
            }),
            kind::SIGNAL => match payload {
                [signal @ 1..=64] => Some(Self::Signal(*signal)),
                _ => None,
            },
            kind::RESIZE => match payload {
                [r0, r1, c0, c1] => Some(Self::Resize(Size {
                    rows: u16::from_le_bytes([*r0, *r1]),
                    columns: u16::from_le_bytes([*c0, *c1]),
                })),
                _ => None,
            },
            other => return Err(Malformed::Kind(other)),
        };
        message.ok_or(content)
    }

    /// Writes the message as a frame of `channel`; none if there is no room for it in `out`, or it
    /// is longer than a frame.
    pub fn encode(&self, channel: u32, out: &mut [u8]) -> Option<usize> {
        let mut write = Write::new(out)?;
        let (kind, stream) = match *self {
            Self::Hello(version) => (write.hello(version)?, 0),
            Self::Exec(exec) => {
                write.bytes(&[exec.flags])?;
                for number in [exec.size.rows, exec.size.columns, exec.arguments, exec.environment]
                {
                    write.bytes(&number.to_le_bytes())?;
                }
                write.bytes(exec.strings)?;
                (kind::EXEC, 0)
            }
            Self::Read(path) => (write.bytes(path).map(|()| kind::READ)?, 0),
            Self::Write { mode, path } => {
                write.bytes(&mode.to_le_bytes())?;
                (write.bytes(path).map(|()| kind::WRITE)?, 0)
            }
            Self::Flow(stream, flow) => (write.flow(flow)?, stream as u8),
            Self::Signal(signal) => (write.bytes(&[signal]).map(|()| kind::SIGNAL)?, 0),
            Self::Resize(size) => {
                write.bytes(&size.rows.to_le_bytes())?;
                (write.bytes(&size.columns.to_le_bytes()).map(|()| kind::RESIZE)?, 0)
            }
        };
        write.finish(kind, stream, channel)
    }
}

impl<'a> ToHost<'a> {
    /// Understands a frame of the agent.
    ///
    /// # Errors
    /// [`Malformed`] if it is not one of these messages, to the last byte.
    pub fn parse(frame: &Frame<'a>) -> Result<Self, Malformed> {
        let content = Malformed::Content(frame.kind);
        if let Some((stream, flow)) = flow(frame).ok_or(content)? {
            return Ok(Self::Flow(stream, flow));
        }
        let message = match (frame.kind, frame.payload) {
            (kind::HELLO, payload) => return hello(payload).map(Self::Hello),
            (kind::STARTED, pid) => pid.try_into().ok().map(u32::from_le_bytes).map(Self::Started),
            (kind::OPENED, payload) => payload.split_first_chunk().and_then(|(mode, size)| {
                let size = u64::from_le_bytes(size.try_into().ok()?);
                Some(Self::Opened { mode: u32::from_le_bytes(*mode), size })
            }),
            (kind::FAILED, [step, e0, e1]) => Step::from_byte(*step)
                .map(|step| Failure { step, errno: u16::from_le_bytes([*e0, *e1]) })
                .filter(|failure| (1..4096).contains(&failure.errno))
                .map(Self::Failed),
            (kind::EXITED, [0, code]) => Some(Self::Exited(Exit::Code(*code))),
            (kind::EXITED, [1, signal @ 1..=64]) => Some(Self::Exited(Exit::Signal(*signal))),
            (kind::STORED, []) => Some(Self::Stored),
            (kind::FAILED | kind::EXITED | kind::STORED, _) => None,
            (other, _) => return Err(Malformed::Kind(other)),
        };
        message.ok_or(content)
    }

    /// Writes the message as a frame of `channel`; none if there is no room for it in `out`, or it
    /// is longer than a frame.
    pub fn encode(&self, channel: u32, out: &mut [u8]) -> Option<usize> {
        let mut write = Write::new(out)?;
        let (kind, stream) = match *self {
            Self::Hello(version) => (write.hello(version)?, 0),
            Self::Started(pid) => (write.bytes(&pid.to_le_bytes()).map(|()| kind::STARTED)?, 0),
            Self::Opened { mode, size } => {
                write.bytes(&mode.to_le_bytes())?;
                (write.bytes(&size.to_le_bytes()).map(|()| kind::OPENED)?, 0)
            }
            Self::Failed(Failure { step, errno }) => {
                write.bytes(&[step as u8])?;
                (write.bytes(&errno.to_le_bytes()).map(|()| kind::FAILED)?, 0)
            }
            Self::Flow(stream, flow) => (write.flow(flow)?, stream as u8),
            Self::Exited(Exit::Code(code)) => (write.bytes(&[0, code]).map(|()| kind::EXITED)?, 0),
            Self::Exited(Exit::Signal(signal)) => {
                (write.bytes(&[1, signal]).map(|()| kind::EXITED)?, 0)
            }
            Self::Stored => (kind::STORED, 0),
        };
        write.finish(kind, stream, channel)
    }
}

/// A frame that is being written: its payload first.
struct Write<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl<'a> Write<'a> {
    fn new(out: &'a mut [u8]) -> Option<Self> {
        (out.len() >= HEADER).then_some(Self { out, at: HEADER })
    }

    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.at.checked_add(bytes.len())?;
        self.out.get_mut(self.at..end)?.copy_from_slice(bytes);
        self.at = end;
        Some(())
    }

    fn hello(&mut self, version: u16) -> Option<u8> {
        self.bytes(&MAGIC)?;
        self.bytes(&version.to_le_bytes()).map(|()| kind::HELLO)
    }

    fn flow(&mut self, flow: Flow<'_>) -> Option<u8> {
        Some(match flow {
            Flow::Data(bytes) => self.bytes(bytes).map(|()| kind::DATA)?,
            Flow::End => kind::END,
            Flow::Credit(bytes) => self.bytes(&bytes.to_le_bytes()).map(|()| kind::CREDIT)?,
            Flow::Close => kind::CLOSE,
        })
    }

    fn finish(self, kind: u8, stream: u8, channel: u32) -> Option<usize> {
        let len = u16::try_from(self.at - HEADER).ok()?;
        let header = header(kind, stream, channel, len);
        self.out.first_chunk_mut().map(|first| *first = header)?;
        Some(self.at)
    }
}

//! One command or one file: its streams, and what the host has still to be told of it.

use core::ops::DerefMut;

use super::Violation;
use super::os::{EAGAIN, ECANCELED, EINTR, Errno, Os, Spawned};
use super::outbox::Outbox;
use super::ring::Ring;
use crate::protocol::{Exit, Failure, Flow, Size, Step, Stream, ToHost, WINDOW};

/// One of the files of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Tells whether the program could be executed.
    Verdict,
    Input,
    Output,
    Error,
}

/// What a file is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Read,
    Write,
}

/// Where bytes from the host go.
struct Input<O: Os> {
    fd: O::Fd,
    ring: Ring<O::Buffer>,
    ending: Ending,
    /// Room that the host has not been told of.
    freed: u32,
    terminal: bool,
}

/// Whether more comes after what is in the ring.
#[derive(PartialEq, Eq)]
enum Ending {
    Open,
    Asked,
    /// The terminal has been told.
    Typed,
}

/// Where bytes for the host come from.
struct Output<Fd> {
    stream: Stream,
    /// None when there are no more, which the host has to be told.
    fd: Option<Fd>,
    credit: u32,
}

impl<Fd> Output<Fd> {
    fn new(stream: Stream, fd: Fd) -> Self {
        Self { stream, fd: Some(fd), credit: WINDOW }
    }
}

/// What has become of a command's program.
enum Program<Fd> {
    /// It is about to be executed.
    Starting(Fd),
    /// It is executed, which the host has to be told.
    Started,
    /// The host knows.
    Told,
}

struct Command<Fd> {
    process: u32,
    program: Program<Fd>,
    exit: Option<Exit>,
    /// The host knows of the exit.
    exit_told: bool,
}

enum Work<Fd> {
    Command(Command<Fd>),
    Reading,
    Writing,
}

pub(crate) struct Channel<O: Os> {
    /// None once the host knows that the channel is closed.
    id: Option<u32>,
    work: Work<O::Fd>,
    input: Option<Input<O>>,
    /// The reader of the input is gone, which the host has to be told.
    input_lost: bool,
    outputs: [Option<Output<O::Fd>>; 2],
    failure: Option<Failure>,
}

impl<O: Os> Channel<O> {
    fn new(id: u32, work: Work<O::Fd>) -> Self {
        Self {
            id: Some(id),
            work,
            input: None,
            input_lost: false,
            outputs: [None, None],
            failure: None,
        }
    }

    pub(crate) fn command(id: u32, spawned: Spawned<O::Fd>, ring: O::Buffer) -> Self {
        let Spawned { process, verdict, input, output, error, terminal } = spawned;
        let program = Program::Starting(verdict);
        let mut channel = Self::new(
            id,
            Work::Command(Command { process, program, exit: None, exit_told: false }),
        );
        channel.input = input.map(|fd| Input::new(fd, ring, terminal));
        channel.outputs = [
            output.map(|fd| Output::new(Stream::Output, fd)),
            error.map(|fd| Output::new(Stream::Error, fd)),
        ];
        channel
    }

    pub(crate) fn reading(id: u32, fd: O::Fd) -> Self {
        let mut channel = Self::new(id, Work::Reading);
        channel.outputs = [Some(Output::new(Stream::Output, fd)), None];
        channel
    }

    pub(crate) fn writing(id: u32, fd: O::Fd, ring: O::Buffer) -> Self {
        let mut channel = Self::new(id, Work::Writing);
        channel.input = Some(Input::new(fd, ring, false));
        channel
    }

    pub(crate) fn is(&self, id: u32) -> bool {
        self.id == Some(id)
    }

    /// The process, unless it has been reaped.
    pub(crate) fn process(&self) -> Option<u32> {
        match &self.work {
            Work::Command(command) if command.exit.is_none() => Some(command.process),
            _ => None,
        }
    }

    /// The host is gone. True if nothing is left to be waited for.
    pub(crate) fn abandon(&mut self, os: &mut O) -> bool {
        /// Linux's SIGKILL.
        const KILL: u8 = 9;
        self.signal(os, KILL);
        self.shut();
        self.id = None;
        self.process().is_none()
    }

    /// Closes all files.
    fn shut(&mut self) {
        self.input = None;
        self.outputs = [None, None];
        if let Work::Command(command) = &mut self.work {
            command.program = Program::Told;
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.shut();
        self.failure = Some(failure);
    }

    pub(crate) fn signal(&mut self, os: &mut O, signal: u8) {
        if let Some(process) = self.process() {
            os.signal(process, signal);
        }
    }

    pub(crate) fn resize(&mut self, os: &mut O, size: Size) {
        let terminal = self.input.as_ref().filter(|input| input.terminal).map(|input| &input.fd);
        if let Some(fd) = terminal {
            os.resize(fd, size);
        }
    }

    /// Takes the next bytes of the input.
    pub(crate) fn feed(&mut self, os: &mut O, bytes: &[u8]) -> Result<(), Violation> {
        // Without a reader they are void: the host is being told so.
        let Some(input) = &mut self.input else { return Ok(()) };
        if input.ending != Ending::Open || !input.ring.push(bytes) {
            return Err(Violation);
        }
        self.drain(os);
        Ok(())
    }

    pub(crate) fn end_input(&mut self, os: &mut O) {
        if let Some(input) = &mut self.input {
            if input.ending == Ending::Open {
                input.ending = Ending::Asked;
            }
            self.drain(os);
        }
    }

    /// The host has no use for the channel's input any more: a file is left as it is.
    pub(crate) fn give_up(&mut self) {
        match self.work {
            Work::Writing => self.fail(Failure { step: Step::Transfer, errno: ECANCELED.0 }),
            _ => self.input = None,
        }
    }

    pub(crate) fn credit(&mut self, stream: Stream, bytes: u32) -> Result<(), Violation> {
        let mut outputs = self.outputs.iter_mut().flatten();
        let Some(output) = outputs.find(|output| output.stream == stream) else { return Ok(()) };
        let credit = output.credit.checked_add(bytes).filter(|&credit| credit <= WINDOW);
        output.credit = credit.ok_or(Violation)?;
        Ok(())
    }

    /// The host reads no more of `stream`.
    pub(crate) fn close(&mut self, stream: Stream) {
        for output in self.outputs.iter_mut().flatten().filter(|output| output.stream == stream) {
            output.fd = None;
        }
    }

    pub(crate) fn interests(&self, room: bool, mut each: impl FnMut(End, &O::Fd, Want)) {
        if let Work::Command(Command { program: Program::Starting(verdict), .. }) = &self.work {
            each(End::Verdict, verdict, Want::Read);
            // A program's first word comes after the word that it runs.
            return;
        }
        if let Some(input) = self.input.as_ref().filter(|input| !input.ring.is_empty()) {
            each(End::Input, &input.fd, Want::Write);
        }
        for output in self.outputs.iter().flatten().filter(|output| room && output.credit > 0) {
            if let Some(fd) = &output.fd {
                let end = if output.stream == Stream::Error { End::Error } else { End::Output };
                each(end, fd, Want::Read);
            }
        }
    }

    pub(crate) fn ready(&mut self, os: &mut O, end: End, outbox: &mut Outbox<O::Buffer>) {
        match end {
            End::Verdict => self.judge(os),
            End::Input => self.drain(os),
            End::Output => self.fill(os, 0, outbox),
            End::Error => self.fill(os, 1, outbox),
        }
    }

    /// Learns whether the program runs.
    fn judge(&mut self, os: &mut O) {
        let Work::Command(command) = &mut self.work else { return };
        let Program::Starting(verdict) = &command.program else { return };
        let mut word = [0; 3];
        match os.read(verdict, &mut word) {
            Err(EAGAIN | EINTR) => {}
            Ok(3) => {
                let [step, e0, e1] = word;
                let step = Step::from_byte(step).unwrap_or(Step::Execute);
                self.fail(Failure { step, errno: u16::from_le_bytes([e0, e1]) });
            }
            Ok(_) | Err(_) => {
                command.program = Program::Started;
                self.drain(os);
            }
        }
    }

    /// Writes what the ring holds as far as its reader takes it.
    fn drain(&mut self, os: &mut O) {
        let Some(input) = &mut self.input else { return };
        while !input.ring.is_empty() {
            match os.write(&input.fd, input.ring.front()) {
                Ok(count) => {
                    input.ring.consume(count);
                    input.freed += count as u32;
                }
                Err(EINTR) => {}
                Err(EAGAIN) => return,
                Err(error) => return self.input_failed(error),
            }
        }
        if input.ending == Ending::Asked {
            if input.terminal {
                os.end_terminal(&input.fd);
                input.ending = Ending::Typed;
            } else {
                self.input = None;
            }
        }
    }

    fn input_failed(&mut self, error: Errno) {
        match self.work {
            Work::Writing => self.fail(Failure { step: Step::Transfer, errno: error.0 }),
            _ => {
                self.input = None;
                self.input_lost = true;
            }
        }
    }

    /// Moves bytes of one output to the outbox.
    fn fill(&mut self, os: &mut O, index: usize, outbox: &mut Outbox<O::Buffer>) {
        let Some(id) = self.id else { return };
        let Some(Some(output)) = self.outputs.get_mut(index) else { return };
        let Some(fd) = &output.fd else { return };
        let most = output.credit as usize;
        match outbox.push_data(id, output.stream, most, |into| os.read(fd, into)) {
            None | Some(Err(EAGAIN | EINTR)) => {}
            Some(Ok(count)) if count > 0 => output.credit -= count as u32,
            Some(Err(error)) if matches!(self.work, Work::Reading) => {
                self.fail(Failure { step: Step::Transfer, errno: error.0 });
            }
            // A terminal that nobody has open any more reads as an error.
            Some(_) => output.fd = None,
        }
    }

    /// The process has ended. Whether its program ever ran is known by now.
    pub(crate) fn reaped(&mut self, os: &mut O, exit: Exit) {
        self.judge(os);
        if let Work::Command(command) = &mut self.work {
            command.exit = Some(exit);
        }
    }

    /// Says what is owed to the host. True if the channel is through.
    pub(crate) fn settle(&mut self, outbox: &mut Outbox<O::Buffer>) -> bool {
        if let Some(id) = self.id {
            // Each step leaves what it cannot say for the next time.
            let said = self.tell(id, outbox);
            if said == Told::Last {
                self.id = None;
            }
        }
        self.id.is_none() && self.process().is_none()
    }

    fn tell(&mut self, id: u32, outbox: &mut Outbox<O::Buffer>) -> Told {
        let mut say = |message: ToHost<'_>| {
            let room = outbox.has_room_for_an_answer();
            if room {
                outbox.push(id, &message);
            }
            room
        };
        if let Some(failure) = self.failure {
            return if say(ToHost::Failed(failure)) { Told::Last } else { Told::Open };
        }
        if let Work::Command(command) = &mut self.work
            && !command.tell_start(&mut say)
        {
            return Told::Open;
        }
        if let Some(input) = &mut self.input
            // Small steps would be more frames than bytes.
            && input.freed >= WINDOW / 2
            && say(ToHost::Flow(Stream::Input, Flow::Credit(input.freed)))
        {
            input.freed = 0;
        }
        if self.input_lost && say(ToHost::Flow(Stream::Input, Flow::Close)) {
            self.input_lost = false;
        }
        if let Work::Command(command) = &mut self.work
            && let Some(exit) = command.exit
            && !command.exit_told
            && say(ToHost::Exited(exit))
        {
            command.exit_told = true;
            self.input = None;
        }
        for slot in &mut self.outputs {
            if let Some(Output { fd: None, stream, .. }) = slot
                && say(ToHost::Flow(*stream, Flow::End))
            {
                *slot = None;
            }
        }
        let silent = self.outputs.iter().all(Option::is_none);
        let through = match &self.work {
            // Others may still write to a command's outputs after its end.
            Work::Command(command) => command.exit_told && silent,
            Work::Reading => silent,
            Work::Writing => self.input.is_none() && say(ToHost::Stored),
        };
        if through { Told::Last } else { Told::Open }
    }
}

#[derive(PartialEq, Eq)]
enum Told {
    Open,
    Last,
}

impl<Fd> Command<Fd> {
    /// Tells that the program runs. True once that is known to the host.
    fn tell_start(&mut self, say: &mut impl FnMut(ToHost<'_>) -> bool) -> bool {
        if matches!(self.program, Program::Started) && say(ToHost::Started(self.process)) {
            self.program = Program::Told;
        }
        matches!(self.program, Program::Told)
    }
}

impl<O: Os> Input<O> {
    fn new(fd: O::Fd, ring: O::Buffer, terminal: bool) -> Self
    where
        O::Buffer: DerefMut<Target = [u8]>,
    {
        Self { fd, ring: Ring::new(ring), ending: Ending::Open, freed: 0, terminal }
    }
}

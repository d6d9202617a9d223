//! All connections of a guest, found by ports, and who may speak to it next.
//!
//! Bounded in every direction: [`MOST`] connections, one entry each in the speakers' queue, and
//! [`MOST_REFUSALS`] refusals, after which the guest's packets wait.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;

use super::connection::{Connection, Key, Said, State, Taken, owed};
use super::host::Host;
use super::packet::{Header, STREAM, op};
use crate::{Fault, Interest, Poller, Reader, Writer};

/// Most connections at a time, with those a host program has only begun to ask for.
pub(super) const MOST: usize = 256;
/// Most refusals that wait for the driver's buffers.
const MOST_REFUSALS: usize = 64;
/// First port of host programs that connect to the guest.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// What was wrong with a packet.
pub(super) type Misuse = &'static str;

pub(super) struct Table {
    cid: u64,
    poller: Option<Poller>,
    /// Indexed by the token of the connection's socket.
    slots: Vec<Option<Connection>>,
    by_key: HashMap<Key, usize>,
    /// Tokens of who may have something to say, in order; each once.
    speakers: VecDeque<usize>,
    refusals: VecDeque<Header>,
    next_port: u32,
}

impl Table {
    pub(super) fn new(cid: u64) -> Self {
        Self {
            cid,
            poller: None,
            slots: Vec::new(),
            by_key: HashMap::new(),
            speakers: VecDeque::new(),
            refusals: VecDeque::with_capacity(MOST_REFUSALS),
            next_port: FIRST_HOST_PORT,
        }
    }

    pub(super) fn set_poller(&mut self, poller: Poller) {
        self.poller = Some(poller);
    }

    /// Connections there are.
    pub(super) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// True if the guest's packets must wait, because their refusals could not be kept.
    pub(super) fn is_congested(&self) -> bool {
        self.refusals.len() >= MOST_REFUSALS
    }

    /// True if there may be something to say to the guest.
    pub(super) fn wants_to_speak(&self) -> bool {
        !self.refusals.is_empty() || !self.speakers.is_empty()
    }

    fn get(&mut self, token: usize) -> Option<&mut Connection> {
        self.slots.get_mut(token)?.as_mut()
    }

    fn queue_speaker(&mut self, token: usize) {
        if self.get(token).is_some_and(|c| c.wants_to_speak()) && !self.speakers.contains(&token) {
            self.speakers.push_back(token);
        }
    }

    fn insert(&mut self, connection: Connection) -> io::Result<usize> {
        let free = self.slots.iter().position(Option::is_none);
        let token = match free {
            Some(token) => token,
            None if self.slots.len() < MOST => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return Err(io::ErrorKind::ResourceBusy.into()),
        };
        if let Some(poller) = &self.poller {
            let interest = Interest::READ | Interest::WRITE;
            poller.add(&connection.stream, token as u32, interest)?;
        }
        if connection.state != State::Greeting {
            self.by_key.insert(connection.key, token);
        }
        if let Some(slot) = self.slots.get_mut(token) {
            *slot = Some(connection);
        }
        Ok(token)
    }

    fn remove(&mut self, token: usize) {
        self.forget(token);
        if let Some(slot) = self.slots.get_mut(token) {
            *slot = None;
        }
    }

    /// The guest knows the connection no more.
    fn forget(&mut self, token: usize) {
        let Some(key) = self.get(token).map(|connection| connection.key) else { return };
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
        self.speakers.retain(|speaker| *speaker != token);
    }

    /// Refuses the packet with `header`, unless it is a refusal itself.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        self.refusals.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: op::RST,
            ..Header::default()
        });
    }

    /// A host port that no connection to guest port `guest` has.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // No more than `MOST` ports are taken.
            if !self.by_key.contains_key(&(port, guest)) {
                return port;
            }
        }
    }

    /// A host program connected to the listening socket and has yet to say where it wants to go.
    pub(super) fn greet(&mut self, stream: UnixStream) {
        // Without a free slot the program finds its connection closed.
        if stream.set_nonblocking(true).is_ok()
            && let Ok(token) = self.insert(Connection::new(stream, (0, 0), State::Greeting))
        {
            self.socket_event(token, true, false);
        }
    }

    /// The embedder wants to connect to `port`.
    pub(super) fn ask(&mut self, port: u32, stream: UnixStream) {
        let key = (self.free_port(port), port);
        let mut connection = Connection::new(stream, key, State::Asking { announce: false });
        connection.owe(owed::REQUEST);
        if let Ok(token) = self.insert(connection) {
            self.queue_speaker(token);
        }
    }

    /// Something happened on a connection's socket.
    pub(super) fn socket_event(&mut self, token: usize, readable: bool, writable: bool) {
        let Some(connection) = self.get(token) else { return };
        connection.readable |= readable;
        if connection.state == State::Greeting {
            match connection.greeting() {
                Ok(None) => return,
                Err(()) => return self.remove(token),
                Ok(Some(port)) => {
                    let key = (self.free_port(port), port);
                    if let Some(connection) = self.get(token) {
                        connection.key = key;
                        connection.state = State::Asking { announce: true };
                        connection.owe(owed::REQUEST);
                    }
                    self.by_key.insert(key, token);
                }
            }
        } else if connection.state == State::Ending {
            if !connection.flush() || connection.is_flushed() {
                self.remove(token);
            }
            return;
        } else if matches!(connection.state, State::Asking { .. }) {
            // A guest may never answer, and a slot would be taken for ever.
            if readable && connection.is_abandoned() {
                if connection.is_unasked() {
                    return self.remove(token);
                }
                connection.owe(owed::RST);
            }
        } else if writable && !connection.flush() {
            connection.owe(owed::RST);
        }
        self.queue_speaker(token);
    }

    /// Takes one packet from the guest.
    pub(super) fn handle(
        &mut self,
        header: &Header,
        data: &mut Reader<'_>,
        host: &Host,
    ) -> Result<Result<(), Misuse>, Fault> {
        if header.src_cid != self.cid {
            return Ok(Err("a packet from another guest's address"));
        }
        if header.dst_cid != super::HOST_CID || header.kind != STREAM {
            self.refuse(header);
            return Ok(Ok(()));
        }
        if u64::from(header.len) > data.remaining() {
            self.refuse(header);
            return Ok(Err("a packet shorter than it says"));
        }
        let key = (header.dst_port, header.src_port);
        let Some(&token) = self.by_key.get(&key) else {
            if header.op == op::REQUEST {
                self.accept(header, key, host);
            } else {
                self.refuse(header);
            }
            return Ok(Ok(()));
        };
        let outcome = self.handle_known(header, token, data)?;
        self.queue_speaker(token);
        Ok(outcome)
    }

    fn handle_known(
        &mut self,
        header: &Header,
        token: usize,
        data: &mut Reader<'_>,
    ) -> Result<Result<(), Misuse>, Fault> {
        let Some(connection) = self.get(token) else { return Ok(Ok(())) };
        connection.credit(header);
        match header.op {
            op::RW => match connection.take(data, header.len)? {
                Taken::All => {}
                Taken::Gone => connection.owe(owed::RST),
                Taken::Misuse => {
                    connection.owe(owed::RST);
                    return Ok(Err("data without credit, or on a connection that is not open"));
                }
            },
            op::RESPONSE if matches!(connection.state, State::Asking { .. }) => connection.opened(),
            // It keeps its place in the table until all is written.
            op::RST if connection.let_go() => self.forget(token),
            op::RST => self.remove(token),
            op::SHUTDOWN => connection.shut_down(header.flags),
            op::CREDIT_REQUEST => connection.owe(owed::CREDIT_UPDATE),
            op::CREDIT_UPDATE => {}
            _ => {
                connection.owe(owed::RST);
                return Ok(Err("a packet that does not fit its connection"));
            }
        }
        Ok(Ok(()))
    }

    /// The guest wants to connect to the host.
    fn accept(&mut self, header: &Header, key: Key, host: &Host) {
        let connected = if self.len() < MOST {
            host.connect(header.dst_port)
        } else {
            Err(io::ErrorKind::ResourceBusy.into())
        };
        let token = connected.and_then(|stream| {
            let mut connection = Connection::new(stream, key, State::Open);
            connection.credit(header);
            connection.owe(owed::RESPONSE);
            self.insert(connection)
        });
        match token {
            Ok(token) => self.queue_speaker(token),
            Err(_) => self.refuse(header),
        }
    }

    /// Says the next thing to the guest; false if there is nothing to say.
    pub(super) fn speak(&mut self, out: &mut Writer<'_>) -> Result<bool, Fault> {
        if let Some(refusal) = self.refusals.pop_front() {
            out.write_all(&refusal.to_bytes())?;
            return Ok(true);
        }
        while let Some(token) = self.speakers.pop_front() {
            let cid = self.cid;
            let Some(connection) = self.get(token) else { continue };
            // Who finds nothing to say may have stepped over a header's place.
            let mut attempt = out.clone();
            match connection.speak(cid, &mut attempt)? {
                Said::Nothing => {}
                Said::Last => {
                    *out = attempt;
                    self.remove(token);
                    return Ok(true);
                }
                Said::Packet { more } => {
                    *out = attempt;
                    if more {
                        // Behind the others: each has its turn.
                        self.speakers.push_back(token);
                    }
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use vmkit_memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout, allocate};

    use super::super::packet::HEADER;
    use super::*;
    use crate::{Chain, Segment};

    const AT: u64 = 0x1000;
    const CREDIT: Header = Header {
        src_cid: 7,
        dst_cid: 2,
        src_port: 0,
        dst_port: 0,
        len: 0,
        kind: STREAM,
        op: op::CREDIT_UPDATE,
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    };

    fn ram() -> GuestRam {
        allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap()
    }

    /// A table with an open connection from guest port 1000 to each of the host ports, and the host's
    /// ends.
    fn table(ports: &[u32]) -> (Table, Vec<UnixStream>) {
        let mut table = Table::new(CREDIT.src_cid);
        let open = |&port| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut connection = Connection::new(ours, (port, 1000), State::Open);
            connection.credit(&CREDIT);
            table.insert(connection).unwrap();
            theirs
        };
        let streams = ports.iter().map(open).collect();
        (table, streams)
    }

    fn nobody() -> Host {
        Host::new(mpsc::channel().1, crate::Wake::new().unwrap())
    }

    /// What the table puts into a buffer of the driver's: how much was written, and the packet in it.
    fn hear(table: &mut Table, ram: &GuestRam) -> Option<(u32, Header, u8)> {
        ram.write_slice(&[0xEE; 256], GuestAddress(AT)).unwrap();
        let segments = vec![Segment { addr: AT, len: 256 }];
        let chain = Chain { head: 0, segments, readable: 0 };
        let mut writer = chain.writer(ram);
        if !table.speak(&mut writer).unwrap() {
            return None;
        }
        let mut bytes = [0; HEADER + 1];
        ram.read_slice(&mut bytes, GuestAddress(AT)).unwrap();
        let header = Header::parse(bytes.first_chunk().unwrap());
        Some((writer.written(), header, bytes[HEADER]))
    }

    #[test]
    fn one_that_finds_nothing_to_say_leaves_the_buffer_whole_to_the_next() {
        let ram = ram();
        let (mut table, mut streams) = table(&[1, 2]);
        for (token, stream) in streams.iter_mut().enumerate() {
            stream.write_all(b"a").unwrap();
            table.socket_event(token, true, false);
        }
        let said = |table: &mut Table| {
            hear(table, &ram).map(|(written, header, byte)| (written, header.src_port, byte))
        };
        assert_eq!(said(&mut table), Some((45, 1, b'a')));
        assert_eq!(said(&mut table), Some((45, 2, b'a')));
        // The first is asked before, and finds that it has no more.
        streams[1].write_all(b"b").unwrap();
        assert_eq!(said(&mut table), Some((45, 2, b'b')));
        assert_eq!(said(&mut table), None);
    }
    #[test]
    fn a_guest_without_room_is_asked_for_credit_once_however_often_it_says_so() {
        let ram = ram();
        let (mut table, mut streams) = table(&[1]);
        let (host, empty) = (nobody(), Chain::new());
        let tell = |table: &mut Table, fwd_cnt| {
            let header = Header { src_port: 1000, dst_port: 1, buf_alloc: 1, fwd_cnt, ..CREDIT };
            table.handle(&header, &mut empty.reader(&ram), &host).unwrap().unwrap();
        };
        tell(&mut table, 0);
        streams[0].write_all(b"ab").unwrap();
        table.socket_event(0, true, false);
        let ops = |table: &mut Table| hear(table, &ram).map(|(_, header, _)| header.op);
        assert_eq!([ops(&mut table), ops(&mut table)], [Some(op::RW), Some(op::CREDIT_REQUEST)]);
        for _ in 0..3 {
            tell(&mut table, 0);
            assert_eq!(ops(&mut table), None);
        }
        tell(&mut table, 1);
        assert_eq!([ops(&mut table), ops(&mut table)], [Some(op::RW), Some(op::CREDIT_REQUEST)]);
    }

    #[test]
    fn what_a_guest_sent_before_it_let_go_arrives_however_slow_the_reader_is() {
        const PIECE: u32 = 32 << 10;
        let (ram, host) = (ram(), nobody());
        let (mut table, mut streams) = table(&[1]);
        let tell = |table: &mut Table, op, flags, len| {
            let segments = vec![Segment { addr: AT, len: PIECE }];
            let chain = Chain { head: 0, segments, readable: 1 };
            let header = Header { src_port: 1000, dst_port: 1, op, flags, len, ..CREDIT };
            table.handle(&header, &mut chain.reader(&ram), &host).unwrap().unwrap();
        };
        let mut sent = 0_usize;
        while table.get(0).unwrap().is_flushed() {
            sent += 1;
            ram.write_slice(&[sent as u8; PIECE as usize], GuestAddress(AT)).unwrap();
            tell(&mut table, op::RW, 0, PIECE);
        }
        tell(&mut table, op::SHUTDOWN, 3, 0);
        tell(&mut table, op::RST, 0, 0);
        // To the guest it is gone.
        assert_eq!((table.len(), table.by_key.len(), hear(&mut table, &ram)), (1, 0, None));
        let mut found = Vec::new();
        let mut piece = [0; PIECE as usize];
        while found.len() < sent * piece.len() {
            let count = streams[0].read(&mut piece).unwrap();
            assert_ne!(count, 0, "{} of {sent} pieces", found.len() / piece.len());
            found.extend_from_slice(&piece[..count]);
            table.socket_event(0, false, true);
        }
        assert_eq!(streams[0].read(&mut piece).unwrap(), 0);
        let mut pieces = found.chunks(piece.len()).zip(1_usize..);
        assert!(pieces.all(|(piece, n)| *piece == [n as u8; PIECE as usize]));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_host_program_that_does_not_wait_for_the_guests_answer_frees_its_place() {
        let ram = ram();
        let mut table = Table::new(CREDIT.src_cid);
        let ask = |table: &mut Table| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            table.ask(1000, ours);
            theirs
        };
        // The guest is not asked.
        drop(ask(&mut table));
        table.socket_event(0, true, true);
        assert_eq!((table.len(), table.by_key.len(), hear(&mut table, &ram)), (0, 0, None));
        // It has been asked.
        let mut program = ask(&mut table);
        let ops = |table: &mut Table| hear(table, &ram).map(|(_, header, _)| header.op);
        assert_eq!(ops(&mut table), Some(op::REQUEST));
        program.write_all(b"early").unwrap();
        table.socket_event(0, true, true);
        assert_eq!((table.len(), ops(&mut table)), (1, None));
        // It sends no more, and waits.
        program.shutdown(std::net::Shutdown::Write).unwrap();
        table.socket_event(0, true, true);
        assert_eq!((table.len(), ops(&mut table)), (1, None));
        drop(program);
        // What it sent is still to arrive.
        table.socket_event(0, true, true);
        assert_eq!((table.len(), ops(&mut table)), (1, None));
        table.get(0).unwrap().stream.read_exact(&mut [0; 5]).unwrap();
        table.socket_event(0, true, true);
        assert_eq!((ops(&mut table), table.len(), ops(&mut table)), (Some(op::RST), 0, None));
    }

    #[test]
    fn to_send_to_a_host_program_that_is_gone_is_no_misuse() {
        let (ram, host) = (ram(), nobody());
        let (mut table, streams) = table(&[1]);
        drop(streams);
        let segments = vec![Segment { addr: AT, len: 8 }];
        let chain = Chain { head: 0, segments, readable: 1 };
        let header = Header { src_port: 1000, dst_port: 1, op: op::RW, len: 8, ..CREDIT };
        let mut tell = || table.handle(&header, &mut chain.reader(&ram), &host).unwrap();
        assert_eq!(tell(), Ok(()));
        assert_eq!(hear(&mut table, &ram).map(|(_, header, _)| header.op), Some(op::RST));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn who_writes_to_a_guest_that_receives_no_more_is_told() {
        let (mut table, mut streams) = table(&[1]);
        table.get(0).unwrap().shut_down(1);
        let error = streams[0].write(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}

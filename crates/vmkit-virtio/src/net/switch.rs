//! An Ethernet switch in this process, that joins the cards plugged into it, also of different
//! machines.
//!
//! It learns which addresses are behind which port, and floods what it does not know. Nothing grows
//! with what guests send: the table of addresses and each port's queue are bounded, and a full queue
//! drops frames, as a real one does. It believes what addresses a port sends from, unless the port was
//! [given one](Switch::plug_as).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::offload::WIRE;
use super::{NetBackend, Offload};
use crate::{Event, Interest, Poller, Wake};

/// Most addresses the switch remembers.
const MOST_ADDRESSES: usize = 1024;
/// Most addresses of one port.
const MOST_PER_PORT: usize = 64;
/// Bytes that wait for a port.
const INBOX: usize = 4 << 20;
/// Bytes before a frame in the inbox: its length, and what is left to do on it.
const HEAD: usize = 4 + WIRE;

type Address = [u8; 6];

/// A switch. Clones are the same switch.
///
/// Cards on it trust each other as those on a real one without port security do: who sends from a
/// neighbour's address is sent what is for the neighbour, an address stays known until its port is
/// unplugged, and when 1024 are known the frames to all others go to every port. Between guests that do
/// not trust each other give each port its address ([`plug_as`](Self::plug_as)).
#[derive(Clone, Default)]
pub struct Switch {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    state: RwLock<State>,
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    next: u64,
    ports: Vec<Arc<Socket>>,
    table: HashMap<Address, Place>,
}

/// Where an address is.
#[derive(Clone, Copy)]
struct Place {
    port: u64,
    /// It was given to the port, and stays there.
    given: bool,
}

/// Where frames for one card wait.
struct Socket {
    id: u64,
    /// The only address it sends from, if it was given one.
    address: Option<Address>,
    /// Addresses in the table that are behind it.
    addresses: AtomicUsize,
    inbox: Mutex<VecDeque<u8>>,
    wake: Wake,
}

impl std::fmt::Debug for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Switch").field("ports", &self.ports()).finish_non_exhaustive()
    }
}

impl Switch {
    /// A switch with nothing plugged in.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cards plugged in.
    pub fn ports(&self) -> usize {
        self.inner.read().ports.len()
    }

    /// Frames dropped because a card's queue was full.
    pub fn dropped(&self) -> u64 {
        self.inner.dropped.load(Ordering::Relaxed)
    }

    /// A new port, which is unplugged when dropped. [`Net::switch`](crate::Net::switch) does this;
    /// an embedder can also take part in the network itself.
    ///
    /// # Errors
    /// What the host said.
    pub fn plug(&self) -> io::Result<impl NetBackend + use<>> {
        self.plug_in(None)
    }

    /// A new port for the card with address `mac`, and nobody else: it may send from that address only,
    /// no other port can have it, and what is for an address that the switch does not know does not come
    /// here. (A machine that is loaded has the card's address from when it was saved.)
    ///
    /// ```
    /// use vmkit_virtio::{Net, Switch};
    ///
    /// let (switch, mac) = (Switch::new(), [2, 0, 0, 0, 0, 1]);
    /// let card = Net::new(switch.plug_as(mac)?).mac(mac);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidInput` if `mac` is a group's, `AddrInUse` if it was given to another port, or what the host
    /// said.
    pub fn plug_as(&self, mac: [u8; 6]) -> io::Result<impl NetBackend + use<>> {
        if is_group(mac) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.plug_in(Some(mac))
    }

    fn plug_in(&self, address: Option<Address>) -> io::Result<SwitchPort> {
        let mut state = self.inner.write();
        if address.is_some_and(|mac| state.table.get(&mac).is_some_and(|place| place.given)) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let socket = Arc::new(Socket {
            id: state.next,
            address,
            addresses: AtomicUsize::new(0),
            inbox: Mutex::new(VecDeque::with_capacity(INBOX)),
            wake: Wake::new()?,
        });
        state.next += 1;
        state.ports.push(socket.clone());
        if let Some(mac) = address {
            // There is room for it: as many as the embedder plugs in.
            state.put(mac, &socket, true);
        }
        Ok(SwitchPort { switch: self.inner.clone(), socket, touched: Vec::new() })
    }
}

impl State {
    /// True if `address` is not yet known to be behind `port`, and there is room to remember it.
    fn would_learn(&self, address: Address, port: &Socket) -> bool {
        let room = port.addresses.load(Ordering::Relaxed) < MOST_PER_PORT;
        match self.table.get(&address) {
            // It has moved.
            Some(place) => room && !place.given && place.port != port.id,
            None => room && self.table.len() < MOST_ADDRESSES,
        }
    }

    fn put(&mut self, address: Address, port: &Socket, given: bool) {
        let before = self.table.insert(address, Place { port: port.id, given });
        port.addresses.fetch_add(1, Ordering::Relaxed);
        let from = before.and_then(|place| self.ports.iter().find(|port| port.id == place.port));
        if let Some(from) = from {
            from.addresses.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Inner {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that `address` is behind `port`, if there is still room for it.
    fn learn(&self, address: Address, port: &Socket) {
        let mut state = self.write();
        if state.would_learn(address, port) {
            state.put(address, port, false);
        }
    }

    fn put(&self, socket: &Socket, frame: &[u8], offload: &Offload) -> bool {
        let mut inbox = socket.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if inbox.len() + HEAD + frame.len() > INBOX {
            drop(inbox);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        inbox.extend((frame.len() as u32).to_le_bytes());
        inbox.extend(offload.to_bytes(0));
        inbox.extend(frame);
        true
    }
}

struct SwitchPort {
    switch: Arc<Inner>,
    socket: Arc<Socket>,
    /// Ports that got frames since the last flush.
    touched: Vec<Arc<Socket>>,
}

impl SwitchPort {
    fn deliver(&mut self, to: &Arc<Socket>, frame: &[u8], offload: &Offload) {
        if self.switch.put(to, frame, offload) && self.touched.iter().all(|t| t.id != to.id) {
            self.touched.push(to.clone());
        }
    }
}

fn is_group(address: Address) -> bool {
    address[0] & 1 != 0
}

impl NetBackend for SwitchPort {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.socket.wake, 0, Interest::READ)
    }

    fn event(&mut self, _: Event) {}

    fn carries_offloads(&self) -> bool {
        true
    }

    fn send(&mut self, frame: &[u8], offload: &Offload) -> io::Result<()> {
        let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = frame else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let (to, from) = ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]);
        if self.socket.address.is_some_and(|given| given != from) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (mine, switch) = (self.socket.id, self.switch.clone());
        let state = switch.read();
        // Another port's own address.
        if state.table.get(&from).is_some_and(|place| place.given && place.port != mine) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let place = state.table.get(&to).filter(|_| !is_group(to)).map(|place| place.port);
        for port in state.ports.iter().filter(|port| port.id != mine) {
            let wanted = match place {
                Some(place) => place == port.id,
                None => is_group(to) || port.address.is_none(),
            };
            if wanted {
                self.deliver(port, frame, offload);
            }
        }
        // Only who has something to tell waits for the others.
        let learns = !is_group(from) && state.would_learn(from, &self.socket);
        drop(state);
        if learns {
            switch.learn(from, &self.socket);
        }
        Ok(())
    }

    fn flush(&mut self) {
        self.touched.drain(..).for_each(|socket| socket.wake.wake());
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<(usize, Offload)> {
        let mut inbox = self.socket.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut length, mut offload) = ([0; 4], [0; WIRE]);
        if inbox.len() < HEAD {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        take(&mut inbox, &mut length);
        take(&mut inbox, &mut offload);
        let len = u32::from_le_bytes(length) as usize;
        match into.get_mut(..len) {
            Some(into) => take(&mut inbox, into),
            None => drop(inbox.drain(..len)),
        }
        Ok((len, Offload::parse(&offload).unwrap_or_default()))
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        let mut state = self.switch.write();
        state.ports.retain(|port| port.id != self.socket.id);
        state.table.retain(|_, place| place.port != self.socket.id);
    }
}

/// Moves bytes from the front of `from` to all of `into`.
fn take(from: &mut VecDeque<u8>, into: &mut [u8]) {
    let (front, back) = from.as_slices();
    let first = front.len().min(into.len());
    let (start, end) = into.split_at_mut(first);
    start.copy_from_slice(front.get(..first).unwrap_or_default());
    end.iter_mut().zip(back).for_each(|(to, byte)| *to = *byte);
    let count = into.len().min(from.len());
    from.drain(..count);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8, fill: u8) -> Vec<u8> {
        [&[0, 0, 0, 0, 0, to, 0, 0, 0, 0, 0, from][..], &[fill; 50]].concat()
    }

    fn heard(port: &mut (impl NetBackend + ?Sized)) -> Option<u8> {
        let mut into = vec![0; crate::MAX_FRAME];
        port.receive(&mut into).ok().map(|(len, _)| into[len - 1])
    }

    #[test]
    fn frames_go_everywhere_until_the_place_is_known() {
        let switch = Switch::new();
        let (mut a, mut b, mut c) =
            (switch.plug().unwrap(), switch.plug().unwrap(), switch.plug().unwrap());
        a.send(&frame(2, 1, 10), &Offload::default()).unwrap();
        assert_eq!((heard(&mut a), heard(&mut b), heard(&mut c)), (None, Some(10), Some(10)));
        b.send(&frame(1, 2, 20), &Offload::default()).unwrap();
        assert_eq!((heard(&mut a), heard(&mut b), heard(&mut c)), (Some(20), None, None));
        a.send(&frame(2, 1, 30), &Offload::default()).unwrap();
        assert_eq!((heard(&mut b), heard(&mut c)), (Some(30), None));
        let broadcast = [&[0xFF; 6][..], &frame(0, 1, 40)[6..]].concat();
        a.send(&broadcast, &Offload::default()).unwrap();
        assert_eq!((heard(&mut b), heard(&mut c)), (Some(40), Some(40)));
        // A station that moves is found again.
        c.send(&frame(1, 2, 50), &Offload::default()).unwrap();
        assert_eq!(heard(&mut a), Some(50));
        a.send(&frame(2, 1, 60), &Offload::default()).unwrap();
        assert_eq!((heard(&mut b), heard(&mut c)), (None, Some(60)));
        drop(c);
        assert_eq!(switch.ports(), 2);
        a.send(&frame(2, 1, 70), &Offload::default()).unwrap();
        assert_eq!(heard(&mut b), Some(70));
    }

    #[test]
    fn a_port_with_an_address_of_its_own_can_neither_take_anothers_nor_lose_it() {
        let switch = Switch::new();
        let (nothing, mac) = (Offload::default(), |n| [0, 0, 0, 0, 0, n]);
        let (mut a, mut b) = (switch.plug_as(mac(1)).unwrap(), switch.plug_as(mac(2)).unwrap());
        let (mut c, mut open) = (switch.plug_as(mac(3)).unwrap(), switch.plug().unwrap());
        let refused = |port: &mut dyn NetBackend, frame: &[u8]| {
            let error = port.send(frame, &nothing).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        };
        // Forged, by a port with an address and by one without.
        refused(&mut c, &frame(2, 1, 10));
        refused(&mut open, &frame(2, 1, 20));
        // Nobody's, and not its own either.
        refused(&mut c, &frame(2, 7, 10));
        b.send(&frame(1, 2, 30), &nothing).unwrap();
        let all = |ports: [&mut dyn NetBackend; 4]| ports.map(heard);
        assert_eq!(all([&mut a, &mut b, &mut c, &mut open]), [Some(30), None, None, None]);
        // What nobody is known to have, and what is for all.
        a.send(&frame(9, 1, 40), &nothing).unwrap();
        assert_eq!(all([&mut a, &mut b, &mut c, &mut open]), [None, None, None, Some(40)]);
        let broadcast = [&[0xFF; 6][..], &frame(0, 1, 50)[6..]].concat();
        a.send(&broadcast, &nothing).unwrap();
        let fifty = Some(50);
        assert_eq!(all([&mut a, &mut b, &mut c, &mut open]), [None, fifty, fifty, fifty]);
        assert!(switch.plug_as(mac(1)).is_err() && switch.plug_as([1, 0, 0, 0, 0, 1]).is_err());
        drop(a);
        switch.plug_as(mac(1)).unwrap();
    }

    #[test]
    fn a_port_takes_no_more_of_its_neighbours_addresses_than_it_may_have() {
        let switch = Switch::new();
        let (mut a, mut b) = (switch.plug().unwrap(), switch.plug().unwrap());
        for n in 0..60 {
            a.send(&frame(200, n, 1), &Offload::default()).unwrap();
            b.send(&frame(200, 100 + n, 1), &Offload::default()).unwrap();
        }
        for n in 0..60 {
            b.send(&frame(200, n, 1), &Offload::default()).unwrap();
        }
        let counts = |switch: &Switch| -> Vec<usize> {
            let state = switch.inner.read();
            state.ports.iter().map(|port| port.addresses.load(Ordering::Relaxed)).collect()
        };
        assert_eq!(counts(&switch), [56, 64]);
        drop(a);
        assert_eq!((counts(&switch), switch.inner.read().table.len()), (vec![64], 64));
    }

    #[test]
    fn neither_the_table_nor_a_queue_grows_without_bound() {
        let switch = Switch::new();
        let (mut a, mut b) = (switch.plug().unwrap(), switch.plug().unwrap());
        for n in 0..5000_u32 {
            let mut frame = frame(9, 0, 1);
            frame[7..11].copy_from_slice(&n.to_le_bytes());
            frame.resize(1514, 0);
            a.send(&frame, &Offload::default()).unwrap();
        }
        assert_eq!(switch.inner.read().table.len(), MOST_PER_PORT);
        assert!(b_len(&switch) <= INBOX && switch.dropped() > 2000);
        assert!(heard(&mut b).is_some());
        assert!(a.send(&[0; 11], &Offload::default()).is_err());
    }

    fn b_len(switch: &Switch) -> usize {
        switch.inner.read().ports[1].inbox.lock().unwrap().len()
    }
}

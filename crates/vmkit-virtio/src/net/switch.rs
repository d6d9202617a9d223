//! An Ethernet switch in this process, that joins the cards plugged into it, also of different
//! machines.
//!
//! It learns which addresses are behind which port, and floods what it does not know. Nothing grows
//! with what guests send: the table of addresses and each port's queue are bounded, and a full queue
//! drops frames, as a real one does.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
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
    table: HashMap<Address, u64>,
}

/// Where frames for one card wait.
struct Socket {
    id: u64,
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
        let mut state = self.inner.write();
        let socket = Arc::new(Socket {
            id: state.next,
            inbox: Mutex::new(VecDeque::with_capacity(INBOX)),
            wake: Wake::new()?,
        });
        state.next += 1;
        state.ports.push(socket.clone());
        Ok(SwitchPort { switch: self.inner.clone(), socket, touched: Vec::new() })
    }
}

impl Inner {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that `address` is behind `port`, if there is room for it.
    fn learn(&self, address: Address, port: u64) {
        let mut state = self.write();
        let of_port = state.table.values().filter(|p| **p == port).count();
        let room = state.table.len() < MOST_ADDRESSES && of_port < MOST_PER_PORT;
        match state.table.get_mut(&address) {
            // It has moved.
            Some(known) => *known = port,
            None if room => {
                state.table.insert(address, port);
            }
            None => {}
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
        let (mine, switch) = (self.socket.id, self.switch.clone());
        let state = switch.read();
        let known = state.table.get(&from) == Some(&mine);
        let place = state.table.get(&to).copied().filter(|_| !is_group(to));
        for port in state.ports.iter().filter(|port| port.id != mine) {
            if place.is_none_or(|place| place == port.id) {
                self.deliver(port, frame, offload);
            }
        }
        drop(state);
        if !known && !is_group(from) {
            switch.learn(from, mine);
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
        state.table.retain(|_, port| *port != self.socket.id);
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

    fn heard(port: &mut impl NetBackend) -> Option<u8> {
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

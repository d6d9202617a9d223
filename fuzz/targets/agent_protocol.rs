//! The guest agent's protocol, each side against a peer that says anything: the host keeps no more
//! than it has room for and nobody waits for ever; the agent, on files and processes that are not
//! there, leaves none open.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_guest::testing::{self, AgentAct, HostAct};

#[derive(Arbitrary, Debug)]
enum Input {
    Guest(Vec<HostAct>),
    Host(Vec<AgentAct>),
    Frames(Vec<u8>),
}

fuzz_target!(|input: Input| match input {
    Input::Guest(acts) => testing::hostile_guest(&acts),
    Input::Host(acts) => testing::hostile_host(&acts),
    Input::Frames(bytes) => testing::frames(&bytes),
});

//! Each side against a peer that says anything: what the fuzz target does, with inputs by chance.

use arbitrary::{Arbitrary, Unstructured};
use proptest::prelude::*;
use vmkit_guest::testing::{AgentAct, HostAct, frames, hostile_guest, hostile_host};

/// What the bytes mean, as the fuzz target understands them.
fn acts<'a, T: Arbitrary<'a>>(bytes: &'a [u8]) -> Vec<T> {
    Unstructured::new(bytes).arbitrary_iter().into_iter().flatten().map_while(Result::ok).collect()
}

proptest! {
    #[test]
    fn a_host_survives_any_guest(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        hostile_guest(&acts::<HostAct>(&bytes));
    }

    #[test]
    fn an_agent_survives_any_host(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        hostile_host(&acts::<AgentAct>(&bytes));
    }

    #[test]
    fn what_is_understood_is_written_the_same(
        words in prop::collection::vec((0_u8..70, 0_u8..4, prop::collection::vec(0_u8..3, 0..20)), 0..20))
    {
        let mut bytes = Vec::new();
        for (kind, stream, payload) in words {
            bytes.extend([kind, stream, payload.len() as u8, 0, 1, 0, 0, 0]);
            bytes.extend(payload);
        }
        frames(&bytes);
    }
}

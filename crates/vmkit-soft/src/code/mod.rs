//! Decoded code: operations, blocks of them, and the cache that finds, links and drops blocks.

mod cache;
mod decode;
mod op;

pub(crate) use cache::{Block, Branch, CodeCache, ELSEWHERE, Key, Link};
pub(crate) use decode::{ColdChoice, Ends};
pub(crate) use op::{ColdFn, FLAG_ADDRESS, FLAG_STACK, Handler, Next, Op, OpRef};

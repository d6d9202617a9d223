//! vmkit's agent: dials the host and does what it asks for, as `vmkit_guest` describes.
//!
//! A freestanding program: no C library, no allocator, one thread. [`service`] is what it does,
//! [`sys`] the kernel it does it with, [`entry`] how the kernel enters it.
//!
//! `vmkit-agent [--cid N] [--port N]` dials that port of that machine (2, the host, if not said)
//! until it is there, and again whenever the connection is lost. `vmkit-agent --fd N` serves the
//! connected socket that it was started with and ends when that does. Without arguments the kernel
//! command line may name a port: `vmkit.agent=1028`.
#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod connection;
mod entry;
mod options;
#[path = "../src/protocol.rs"]
mod protocol;
mod service;
mod sys;

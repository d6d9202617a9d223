//! The wire format: what is written is read the same, and nothing else is read.

#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use vmkit_guest::protocol::{
    Exec, Exit, Failure, Flow, HEADER, Size, Step, Stream, ToAgent, ToHost, flags, split_frame,
};

fn stream() -> impl Strategy<Value = Stream> {
    prop_oneof![Just(Stream::Input), Just(Stream::Output), Just(Stream::Error)]
}

fn flow(bytes: &[u8]) -> impl Strategy<Value = Flow<'_>> {
    prop_oneof![
        Just(Flow::Data(bytes)),
        Just(Flow::End),
        Just(Flow::Close),
        any::<u32>().prop_map(Flow::Credit)
    ]
}

/// Strings as a command has them: no zero bytes, the program not empty.
fn words(most: usize) -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(1_u8.., 1..20), 1..most)
}

fn encoded(encode: impl Fn(&mut [u8]) -> Option<usize>) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + usize::from(u16::MAX)];
    let len = encode(&mut bytes).unwrap();
    // Exactly so much room is enough, and less is not.
    assert_eq!(encode(&mut bytes[..len]), Some(len));
    assert_eq!(encode(&mut bytes[..len - 1]), None);
    bytes.truncate(len);
    bytes
}

proptest! {
    #[test]
    fn words_about_streams_come_back((stream, bytes) in (stream(), prop::collection::vec(any::<u8>(), 1..200)),
        channel in any::<u32>())
    {
        for flow in [Flow::Data(&bytes), Flow::End, Flow::Close, Flow::Credit(channel)] {
            let (to_agent, to_host) = (ToAgent::Flow(stream, flow), ToHost::Flow(stream, flow));
            let bytes = encoded(|out| to_agent.encode(channel, out));
            let (frame, rest) = split_frame(&bytes).unwrap();
            prop_assert_eq!((frame.channel, rest.len()), (channel, 0));
            prop_assert_eq!(ToAgent::parse(&frame), Ok(to_agent));
            prop_assert_eq!(ToHost::parse(&frame), Ok(to_host));
        }
    }

    #[test]
    fn commands_come_back(arguments in words(20), environment in words(20), asked in 0_u8..32,
        (rows, columns) in any::<(u16, u16)>(), directory in prop::collection::vec(1_u8.., 0..20))
    {
        let mut strings = Vec::new();
        for word in [&directory].into_iter().chain(&arguments).chain(&environment) {
            strings.extend(word);
            strings.push(0);
        }
        let exec = Exec {
            flags: asked,
            size: Size { rows, columns },
            arguments: arguments.len() as u16,
            environment: environment.len() as u16,
            strings: &strings,
        };
        let bytes = encoded(|out| ToAgent::Exec(exec).encode(7, out));
        let (frame, _) = split_frame(&bytes).unwrap();
        let ToAgent::Exec(read) = ToAgent::parse(&frame).unwrap() else { panic!("{frame:?}") };
        prop_assert_eq!(read, exec);
        prop_assert_eq!(read.has(flags::TERMINAL), asked & 1 != 0);
        let bare = |string: &[u8]| string[..string.len() - 1].to_vec();
        prop_assert_eq!(bare(read.directory()), directory);
        prop_assert_eq!(bare(read.program()), arguments[0].clone());
        prop_assert_eq!(read.arguments().map(bare).collect::<Vec<_>>(), arguments);
        prop_assert_eq!(read.environment().map(bare).collect::<Vec<_>>(), environment);
        // One string more or fewer than it says is no command.
        for (more, fewer) in [(1, 0), (0, 1)] {
            let exec = Exec { arguments: exec.arguments + more - fewer, ..exec };
            let bytes = encoded(|out| ToAgent::Exec(exec).encode(7, out));
            prop_assert!(ToAgent::parse(&split_frame(&bytes).unwrap().0).is_err());
        }
    }

    #[test]
    fn a_frame_is_whole_or_not_there(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut rest = &bytes[..];
        while let Some((frame, behind)) = split_frame(rest) {
            prop_assert_eq!(HEADER + frame.payload.len() + behind.len(), rest.len());
            // What is understood is written the same.
            let mut again = vec![0; HEADER + frame.payload.len()];
            if let Ok(message) = ToHost::parse(&frame) {
                let len = message.encode(frame.channel, &mut again).unwrap();
                prop_assert_eq!(&again[4..len], &rest[4..len]);
            }
            if let Ok(message) = ToAgent::parse(&frame) {
                let len = message.encode(frame.channel, &mut again).unwrap();
                prop_assert_eq!(&again[4..len], &rest[4..len]);
            }
            rest = behind;
        }
    }

    #[test]
    fn flows_are_of_both_sides(flow in flow(b"x"), stream in stream()) {
        let bytes = encoded(|out| ToHost::Flow(stream, flow).encode(1, out));
        prop_assert_eq!(bytes, encoded(|out| ToAgent::Flow(stream, flow).encode(1, out)));
    }
}

#[test]
fn every_word_of_the_agent_comes_back() {
    let mut words = vec![
        ToHost::Hello(1),
        ToHost::Started(u32::MAX),
        ToHost::Opened { mode: 0o100_644, size: u64::MAX },
        ToHost::Stored,
        ToHost::Exited(Exit::Code(255)),
        ToHost::Exited(Exit::Signal(64)),
    ];
    words.extend((0..).map_while(Step::from_byte).map(|step| {
        assert!(!step.to_string().is_empty());
        ToHost::Failed(Failure { step, errno: 4095 })
    }));
    assert_eq!(words.len(), 14);
    for word in words {
        let bytes = encoded(|out| word.encode(3, out));
        assert_eq!(ToHost::parse(&split_frame(&bytes).unwrap().0), Ok(word));
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |word: ToAgent<'_>| {
        let bytes = encoded(|out| word.encode(3, out));
        assert!(ToAgent::parse(&split_frame(&bytes).unwrap().0).is_err(), "{word:?}");
    };
    let exec = |flags, arguments, strings| Exec {
        flags,
        size: Size::default(),
        arguments,
        environment: 0,
        strings,
    };
    refused(ToAgent::Exec(exec(32, 1, b"\0x\0")));
    refused(ToAgent::Exec(exec(0, 0, b"\0")));
    refused(ToAgent::Exec(exec(0, 1, b"\0\0")));
    refused(ToAgent::Exec(exec(0, 1, b"\0x")));
    refused(ToAgent::Exec(exec(0, 1, b"\0x\0y")));
    refused(ToAgent::Read(b"\0"));
    refused(ToAgent::Read(b"x"));
    refused(ToAgent::Read(b"x\0y\0"));
    refused(ToAgent::Write { mode: 0o10_000, path: b"x\0" });
    refused(ToAgent::Signal(0));
    refused(ToAgent::Signal(65));
    refused(ToAgent::Flow(Stream::Input, Flow::Data(b"")));
    for failure in [0, 4096] {
        let word = ToHost::Failed(Failure { step: Step::Open, errno: failure });
        let bytes = encoded(|out| word.encode(3, out));
        assert!(ToHost::parse(&split_frame(&bytes).unwrap().0).is_err());
    }
}

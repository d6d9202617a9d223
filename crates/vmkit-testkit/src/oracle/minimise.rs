//! Makes a mismatch readable: everything in the state that does not matter is put at rest.

use super::case::{Case, Ending, Fpu, Outcome};
use super::compare::{Comparer, Difference};
use super::native::Native;
use super::run::{Executor, Mismatch, OracleError};

/// Tries, part by part, to put the case's state at rest while its outcomes still differ in something
/// that they differed in before.
pub(super) fn minimise(
    mismatch: &mut Mismatch,
    comparer: &Comparer,
    (native, executor): (&mut Native, &mut Executor),
) -> Result<(), OracleError> {
    let (mut expected, mut got) = (Outcome::default(), Outcome::default());
    for step in steps(&mismatch.case) {
        let mut simpler = mismatch.case.clone();
        step(&mut simpler);
        native.run(&simpler, &mut expected)?;
        if expected.ending != Ending::Exception {
            continue;
        }
        executor.run(&simpler, &mut got)?;
        let left = comparer.differences(&simpler, &mismatch.instruction, &expected, &got);
        let same = mismatch.differences.first().zip(left.first()).is_some_and(|(a, b)| alike(a, b));
        if same {
            mismatch.case = simpler;
            mismatch.differences = left;
            mismatch.refusal = executor.refusal();
        }
    }
    Ok(())
}

/// True if two differences are of one kind: in the same thing, and between the same exceptions.
fn alike(a: &Difference, b: &Difference) -> bool {
    let kind = |text: &str| text.split_once([' ', ',']).map(|(kind, _)| String::from(kind));
    a.what == b.what
        && (a.what != "raised"
            || (kind(&a.expected) == kind(&b.expected) && kind(&a.got) == kind(&b.got)))
}

type Step = Box<dyn Fn(&mut Case)>;

fn steps(case: &Case) -> Vec<Step> {
    let mut steps: Vec<Step> = vec![
        Box::new(|c| c.fpu = Fpu::default()),
        Box::new(|c| c.memory.clear()),
        Box::new(|c| c.rflags = 0x202),
        Box::new(|c| c.fs_base = 0),
        Box::new(|c| c.gs_base = 0),
        Box::new(|c| {
            let mxcsr = c.fpu.mxcsr();
            c.fpu.put(24, &(mxcsr & !0x3F).to_le_bytes());
        }),
        Box::new(|c| c.fpu.put(24, &0x1F80_u32.to_le_bytes())),
        Box::new(|c| c.fpu.put(0, &0x37F_u16.to_le_bytes())),
        Box::new(|c| {
            let top = c.fpu.fsw() & 0x3800;
            c.fpu.put(2, &top.to_le_bytes());
        }),
        Box::new(|c| c.fpu.put(2, &[0, 0])),
        Box::new(|c| c.fpu.put(4, &[0])),
        Box::new(|c| c.fpu.put(4, &[0xFF])),
        Box::new(|c| c.fpu.0[Fpu::YMM_HIGH..].fill(0)),
    ];
    for bit in [0, 2, 4, 6, 7, 10, 11, 18] {
        steps.push(Box::new(move |c| c.rflags &= !(1 << bit)));
    }
    for i in 0..16 {
        steps.push(Box::new(move |c| c.gpr[i] = 0));
        steps.push(Box::new(move |c| c.gpr[i] &= 0xFFFF_FFFF));
        steps.push(Box::new(move |c| c.gpr[i] &= 0xFF));
        steps.push(Box::new(move |c| c.fpu.put(Fpu::XMM + 16 * i, &[0; 16])));
        steps.push(Box::new(move |c| c.fpu.put(Fpu::XMM + 16 * i + 8, &[0; 8])));
        steps.push(Box::new(move |c| c.fpu.put(Fpu::XMM + 16 * i + 4, &[0; 4])));
    }
    for i in 0..8 {
        steps.push(Box::new(move |c| c.fpu.put(Fpu::ST + 16 * i, &[0; 10])));
    }
    for (line, _) in case.memory.iter() {
        steps.push(Box::new(move |c| c.memory.forget(line)));
    }
    steps
}

//! Tells the crate whether the compiler turns calls in tail position into jumps, so that blocks may
//! call their successors: optimised builds do, unless a sanitizer or the checks of debug assertions, which
//! look at copies in memory, keep frames alive.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(vmkit_tail_calls)");
    println!("cargo:rerun-if-changed=build.rs");
    let optimised = std::env::var("OPT_LEVEL").is_ok_and(|level| matches!(&*level, "2" | "3"));
    let sanitized = ["CARGO_CFG_SANITIZE", "CARGO_CFG_FUZZING"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    let checked = std::env::var_os("CARGO_CFG_DEBUG_ASSERTIONS").is_some();
    if optimised && !sanitized && !checked {
        println!("cargo:rustc-cfg=vmkit_tail_calls");
    }
}

//! The crates use each other only as `docs/architecture.md` says.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// The table of `docs/architecture.md`: crate, job, what it may use.
fn allowed() -> Arrows {
    let text = include_str!("../../docs/architecture.md");
    let rows = text.lines().filter(|line| line.starts_with("| `vmkit"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let uses = cells[2].split(", ").filter(|name| *name != "–");
        let uses = uses.map(|name| format!("vmkit-{name}")).collect();
        (cells[0].trim_matches('`').to_owned(), uses)
    })
    .collect()
}

/// What the manifests say, dependencies for tests left out.
fn actual() -> Arrows {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .filter(|package| package["publish"].is_null())
        .map(|package| {
            let uses = package["dependencies"].as_array().unwrap().iter();
            let uses = uses
                .filter(|dependency| dependency["kind"].is_null() && dependency["path"].is_string())
                .map(|dependency| text(&dependency["name"]))
                .collect();
            (text(&package["name"]), uses)
        })
        .collect()
}

#[test]
fn every_arrow_is_in_the_table() {
    let (allowed, actual) = (allowed(), actual());
    let names = |arrows: &Arrows| arrows.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&allowed), names(&actual), "crates in the table and in the workspace");
    for (name, uses) in &actual {
        let wrong: Vec<&String> = uses.difference(&allowed[name]).collect();
        assert!(wrong.is_empty(), "{name} may not use {wrong:?}");
    }
}

#[test]
fn the_table_has_no_cycle() {
    let mut left = allowed();
    while !left.is_empty() {
        let free = left.iter().find(|(_, uses)| uses.iter().all(|name| !left.contains_key(name)));
        let free = free.map(|(name, _)| name.clone());
        let free = free.unwrap_or_else(|| panic!("a cycle among {:?}", left.keys()));
        left.remove(&free);
    }
}

#[test]
fn backends_and_devices_do_not_know_each_other() {
    let allowed = allowed();
    let devices = ["vmkit-chipset", "vmkit-virtio", "vmkit-pci"];
    let backends = ["vmkit-kvm", "vmkit-soft"];
    for device in devices {
        let uses = &allowed[device];
        assert!(!uses.contains("vmkit-hypervisor"), "{device}");
        assert!(backends.iter().all(|backend| !uses.contains(*backend)), "{device}");
    }
    for backend in backends {
        let uses = &allowed[backend];
        assert!(devices.iter().chain(&backends).all(|name| !uses.contains(*name)), "{backend}");
    }
}

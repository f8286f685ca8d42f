//! Who may depend on whom, and where `unsafe` may stand. A new crate fails this test until it is put in the table.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Every crate of the workspace with the crates of ours that it may depend on.
const MAY_DEPEND_ON: [(&str, &[&str]); 11] = [
    ("model", &[]),
    ("nbd", &[]),
    ("decide", &["model"]),
    ("repo", &["model"]),
    ("hypervisor", &["model"]),
    ("cluster", &["model"]),
    ("engine", &["model", "decide", "repo", "nbd", "hypervisor", "cluster"]),
    ("server", &["model", "decide", "repo", "hypervisor", "cluster", "engine", "api"]),
    ("cli", &["model", "decide", "repo", "hypervisor", "engine", "api", "server"]),
    ("api", &[]),
    ("lab", &["model"]),
];

/// Crates that compute and do nothing else, and what they may use besides ours: plain data, text, no runtime, no I/O.
const PURE: [(&str, &[&str]); 2] = [
    ("model", &["jiff", "serde", "serde_json", "thiserror", "uuid"]),
    ("decide", &["jiff", "serde", "serde_json", "thiserror", "toml", "uuid"]),
];

/// Where `unsafe` may stand.
const UNSAFE_ALLOWED: &str = "crates/hypervisor/src/libvirt/";

fn workspace() -> (PathBuf, Vec<Value>) {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let root = metadata["workspace_root"].as_str().expect("workspace_root").into();
    (root, metadata["packages"].as_array().expect("packages").clone())
}

fn short(package: &str) -> Option<&str> {
    package.strip_prefix("virtward-")
}

/// Names of a package's dependencies of the kinds that end up in the product.
fn dependencies(package: &Value) -> BTreeSet<&str> {
    let all = package["dependencies"].as_array().expect("dependencies");
    all.iter().filter(|one| one["kind"] != "dev").filter_map(|one| one["name"].as_str()).collect()
}

#[test]
fn crates_depend_only_on_what_the_table_allows() {
    let (_, packages) = workspace();
    for package in &packages {
        let full = package["name"].as_str().expect("name");
        let name = short(full).unwrap_or_else(|| panic!("{full} is not called virtward-*"));
        let (_, allowed) = MAY_DEPEND_ON
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("crate {name} is new: decide what it may depend on and add it to this table"));
        for dependency in dependencies(package).into_iter().filter_map(short) {
            assert!(allowed.contains(&dependency), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn pure_crates_stay_pure() {
    let (_, packages) = workspace();
    for (name, allowed) in PURE {
        let package = packages
            .iter()
            .find(|package| package["name"].as_str().and_then(short) == Some(name))
            .unwrap_or_else(|| panic!("crate {name} is gone"));
        for dependency in dependencies(package).into_iter().filter(|dependency| short(dependency).is_none()) {
            assert!(allowed.contains(&dependency), "{name} is pure and must not depend on {dependency}");
        }
    }
}

#[test]
fn unsafe_stays_in_the_libvirt_layer() {
    let (root, _) = workspace();
    let mut files = Vec::new();
    sources(&root.join("crates"), &mut files);
    assert!(files.len() > 20, "sources were not found");
    for file in files {
        let name = file.strip_prefix(&root).expect("inside").to_string_lossy().into_owned();
        if name.starts_with(UNSAFE_ALLOWED) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (number, line) in text.lines().enumerate() {
            assert!(!has_unsafe(line), "{name}:{}: `unsafe` belongs in {UNSAFE_ALLOWED}", number + 1);
        }
    }
}

fn sources(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory of sources").map(|entry| entry.expect("an entry")) {
        let path = entry.path();
        if entry.file_type().expect("a type").is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                sources(&path, files);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Whether a line of code uses the keyword: followed by a block, a function, an impl, a trait or an extern, or allowed
/// by an attribute. Comments and texts may speak of it.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let keyword = ["{", "fn ", "impl ", "impl<", "trait ", "extern "].iter().any(|next| {
        code.match_indices("unsafe").any(|(at, word)| {
            let before = code[..at].chars().next_back();
            let after = &code[at + word.len()..];
            before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '"')
                && after.starts_with(char::is_whitespace)
                && after.trim_start().starts_with(next)
        })
    });
    let attribute = ["allow", "expect", "warn"].iter().any(|level| code.contains(&format!("{level}(unsafe_code")));
    keyword || attribute
}

#[test]
fn the_keyword_is_recognised() {
    // Put together here, so that this file does not accuse itself.
    let keyword = "unsafe";
    for rest in ["{ x }", "fn f()", "impl Send for X {}"] {
        for before in ["", "    let x = ", "pub "] {
            assert!(has_unsafe(&format!("{before}{keyword} {rest}")), "{before}{rest}");
        }
    }
    assert!(has_unsafe(&format!("#![{}({keyword}_code)]", "allow")));
    for line in ["// unsafe { x }", "let unsafely = 1;", "//! `unsafe` stays in libvirt", "let force_unsafe = true;"] {
        assert!(!has_unsafe(line), "{line}");
    }
}

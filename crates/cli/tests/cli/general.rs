//! What every command has in common: usage, configuration, help, streams, signals.

use std::{
    fs,
    io::Write,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::common::Sandbox;

#[test]
fn usage_errors_are_2_in_words_and_as_json() {
    let sandbox = Sandbox::new();
    for args in [
        &["frobnicate"][..],
        &["backup", "run"],
        &["backup", "run", "web1", "--all"],
        &["backup", "run", "web1", "--bandwidth", "fast"],
        &["restore", "disk", "web1@latest"],
        &["backup", "verify", "--all", "--percent", "101"],
        &["repo", "info", "--password-file", "a", "--key-file", "b"],
        &["--quiet", "--verbose", "repo", "info"],
    ] {
        sandbox.run(args).code(2).says("error:");
        let json = sandbox.run(&[args, &["--json"]].concat()).code(2);
        assert_eq!(json.error()["kind"], "usage", "{args:?}");
    }
    // What is missing can be had in two ways, and both are named.
    sandbox.run(&["backup", "run"]).code(2).says("--all");
    sandbox.run(&["backup", "verify"]).code(2).says("--all");
}

#[test]
fn a_misspelt_configuration_key_is_found_with_file_line_and_suggestion() {
    let sandbox = Sandbox::new();
    sandbox.write("etc/config.toml", "# comment\n[backup]\nbandwith = \"1MiB\"\n");
    let ran = sandbox.run(&["repo", "info", "--json"]).code(2).says("config.toml, line 3: unknown key \"bandwith\"");
    assert_eq!(ran.error()["hint"], "did you mean \"bandwidth\"?");
    sandbox.run(&["repo", "info", "--config", "/nonexistent.toml"]).code(3).says("/nonexistent.toml");
}

/// Every command, found through the help of its parent.
fn commands(sandbox: &Sandbox, parent: &[&str], all: &mut Vec<Vec<String>>) {
    let help = sandbox.run(&[parent, &["--help"]].concat()).ok().stdout;
    let Some(list) = help.split("\nCommands:\n").nth(1) else { return };
    for name in list.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next()) {
        let path: Vec<&str> = [parent, &[name]].concat();
        all.push(path.iter().map(|word| (*word).to_owned()).collect());
        commands(sandbox, &path, all);
    }
}

#[test]
fn every_command_has_help_with_examples_and_a_manual_page() {
    let sandbox = Sandbox::new();
    let mut all = Vec::new();
    commands(&sandbox, &[], &mut all);
    assert!(all.len() >= 20, "{all:?}");
    sandbox.run(&["man", "--dir", "man"]).ok();
    for path in &all {
        let words: Vec<&str> = path.iter().map(String::as_str).collect();
        let help = sandbox.run(&[&words[..], &["--help"]].concat()).ok().stdout;
        let group = help.contains("\nCommands:\n");
        assert!(group || help.contains("\nExamples:\n"), "{path:?} has no examples:\n{help}");
        let page = sandbox.path(format!("man/virtward-{}.1", path.join("-")));
        let text = fs::read_to_string(&page).unwrap_or_else(|error| panic!("{}: {error}", page.display()));
        assert!(text.contains(".SH NAME"), "{text}");
        assert_eq!(sandbox.run(&[&["man"], &words[..]].concat()).ok().stdout, text);
    }
    assert!(sandbox.path("man/virtward.1").exists());
    assert!(!sandbox.path("man/virtward-internal.1").exists());
    sandbox.run(&["man", "no", "such"]).code(2);
}

#[test]
fn completions_are_made_for_every_shell() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = sandbox.run(&["completions", shell]).ok().stdout;
        assert!(script.contains("bandwidth"), "{shell}");
    }
    fs::write(sandbox.path("v.bash"), sandbox.run(&["completions", "bash"]).stdout).unwrap();
    crate::common::tool("bash", &["-n", &sandbox.text("v.bash")]);
    sandbox.run(&["completions", "tcsh"]).code(2);
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let sandbox = Sandbox::new();
    let mut child = sandbox.command(&["man"]).spawn().unwrap();
    drop(child.stdout.take());
    let ran = crate::common::finish(child);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let mut child = sandbox.command(&["repo", "info", "--json"]).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    crate::common::finish(child).code(7);
}

#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let sandbox = Sandbox::new();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ran = crate::common::finish(sandbox.command(&["man"]).stdout(Stdio::from(full)).spawn().unwrap());
    ran.code(10).says("standard output");
}

#[test]
fn an_unreachable_hypervisor_is_6_and_says_what_to_check() {
    let sandbox = Sandbox::with_repository();
    for args in [&["vm", "list"][..], &["backup", "run", "web1"], &["backup", "run", "--all"]] {
        let ran = sandbox.run(&[args, &["--json"]].concat()).code(6).says("hint:");
        assert_eq!(ran.error()["kind"], "hypervisor-unreachable", "{args:?}");
        assert!(ran.stderr.contains("/nonexistent/virtward-test"), "{}", ran.stderr);
    }
}

#[test]
fn the_thaw_guard_leaves_the_session_and_believes_the_word() {
    let sandbox = Sandbox::new();
    let vm = "11111111-2222-3333-4444-555555555555";
    let mut child = sandbox
        .command(&["internal", "thaw-guard", "--connect", "test:///default", "--vm", vm, "--after-ms", "60000"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let session = |pid: u32| -> String {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while session(pid) != pid.to_string() {
        assert!(Instant::now() < deadline, "the guard stayed in our session");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Give the guard time to be ready for signals; then none of the usual ones ends it.
    std::thread::sleep(Duration::from_millis(300));
    for name in ["INT", "TERM", "HUP"] {
        crate::common::signal(pid, name);
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "a signal ended the guard");
    child.stdin.as_mut().unwrap().write_all(b"thawed\n").unwrap();
    crate::common::finish(child).ok();
    // The word is what counts, not the end of input: without it the guard turns to libvirt.
    let vm_gone = ["internal", "thaw-guard", "--connect", "test:///default", "--vm", vm, "--after-ms", "60000"];
    sandbox.run(&vm_gone).ok();
}

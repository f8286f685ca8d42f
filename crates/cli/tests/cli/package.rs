//! The Debian package, made of this binary: installed into a directory, used, upgraded, removed, purged.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::common::{Sandbox, tool};

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// dpkg on a system of its own, whose scripts touch nothing outside it.
fn dpkg(root: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("dpkg");
    command.arg(format!("--root={}", root.display()));
    command.args(["--force-not-root", "--force-script-chrootless", "--force-depends", "--force-confold"]);
    command.env("LC_ALL", "C").args(args).output().unwrap()
}

#[track_caller]
fn ok(output: Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn the_package_installs_says_what_it_does_not_start_and_leaves_keys_and_repositories() {
    let sandbox = Sandbox::new();
    let script = sources().join("scripts/deb.sh");
    let (binary, out) = (env!("CARGO_BIN_EXE_virtward"), sandbox.text("out"));
    // A test's binary is large, and compressing it well takes minutes.
    let uncompressed = "DEB_COMPRESSION=none";
    let made = tool("env", &[uncompressed, script.to_str().unwrap(), "--binary", binary, "--out", &out]);
    let package = made.trim();
    let control = tool("dpkg-deb", &["--field", package]);
    for field in ["Package: virtward", "libvirt0 (>= 9.0.0)", "qemu-utils", "libc6 (>= 2."] {
        assert!(control.contains(field), "{field} is not in {control}");
    }

    let root = sandbox.path("root");
    for dir in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
    let said = ok(dpkg(&root, &["--install", package]));
    assert!(said.contains("the daemon is not enabled") && said.contains("systemctl enable --now virtward"), "{said}");
    let installed = root.join("usr/bin/virtward");
    assert!(tool(installed.to_str().unwrap(), &["--version"]).starts_with("virtward "));
    for name in [
        "usr/lib/systemd/system/virtward.service",
        "usr/share/man/man1/virtward-serve.1.gz",
        "usr/share/bash-completion/completions/virtward",
        "usr/share/zsh/vendor-completions/_virtward",
        "usr/share/fish/vendor_completions.d/virtward.fish",
        "usr/share/doc/virtward/prometheus/virtward.rules.yml",
        "usr/share/doc/virtward/grafana/virtward.json",
        "usr/share/doc/virtward/operations.md",
        "usr/share/doc/virtward/copyright",
    ] {
        assert!(root.join(name).exists(), "{name}");
    }
    assert!(!root.join("etc/systemd").exists(), "nothing is enabled");
    // What the configuration says is accepted by the program that it is for, as it is and with its examples in use.
    let config = root.join("etc/virtward/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let uncommented: String = text.lines().map(|line| format!("{}\n", commented(line))).collect();
    for text in [text.clone(), uncommented] {
        let file = sandbox.write("try.toml", text);
        sandbox.run(&["state", "list", "--config", &file]).ok();
    }
    // The unit is one.
    if Path::new("/usr/bin/systemd-analyze").exists() {
        let unit = root.join("usr/lib/systemd/system/virtward.service");
        let unit = fs::read_to_string(unit).unwrap().replace("/usr/bin/virtward", installed.to_str().unwrap());
        fs::create_dir(sandbox.path("units")).unwrap();
        let unit = sandbox.write("units/virtward.service", unit);
        let checked = Command::new("systemd-analyze").args(["verify", "--man=no", &unit]).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        let about: Vec<&str> = said.lines().filter(|line| line.contains("virtward")).collect();
        assert!(about.is_empty(), "{about:?}");
    }

    // An upgrade keeps what was changed; a removal keeps the configuration; a purge keeps what cannot be made again.
    fs::write(&config, format!("{text}# mine\n")).unwrap();
    ok(dpkg(&root, &["--install", package]));
    assert!(fs::read_to_string(&config).unwrap().ends_with("# mine\n"));
    fs::write(root.join("etc/virtward/repo.key"), "key").unwrap();
    for name in ["var/lib/virtward/repo/config", "var/lib/virtward/state.db", "var/cache/virtward/x"] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), "").unwrap();
    }
    ok(dpkg(&root, &["--remove", "virtward"]));
    assert!(!installed.exists() && config.exists() && root.join("var/lib/virtward/state.db").exists());
    let said = ok(dpkg(&root, &["--purge", "virtward"]));
    assert!(said.contains("/etc/virtward is left, with the keys"), "{said}");
    assert!(
        !config.exists()
            && !root.join("var/lib/virtward/state.db").exists()
            && !root.join("var/cache/virtward").exists()
    );
    assert!(root.join("etc/virtward/repo.key").exists() && root.join("var/lib/virtward/repo/config").exists());
}

/// A line with the `#` of an example taken away.
fn commented(line: &str) -> &str {
    match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with(' ') => rest,
        _ => line,
    }
}

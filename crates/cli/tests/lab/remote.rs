//! Other hosts' libvirt: over TLS with certificates, over SSH with a key. Both ends are the real ones.

use std::{path::Path, process::Command, time::Duration};

use serde_json::Value;

use crate::harness::{Lab, Running, run, text, wait};

/// A defined VM is enough: what is tested is the way to it.
fn lab_with_vm() -> (Lab, String) {
    let lab = Lab::quick(1);
    lab.guest("web1", &["--no-start"]);
    let tcp = lab.tcp_uri("h1");
    let address = tcp.trim_start_matches("qemu+tcp://").split(['/', ':']).next().expect("an address").to_owned();
    (lab, address)
}

fn in_host(lab: &Lab, script: &str) {
    lab.lab(&["host", "exec", "h1", "--", "sh", "-euc", script]);
}

/// Lists the VMs at an address and takes back a restore point there: reading and changing.
fn assert_works(lab: &Lab, uri: &str) {
    let listed: Value = serde_json::from_str(lab.ok(&["--connect", uri, "vm", "list", "--json"]).trim()).expect("JSON");
    assert_eq!(listed[0]["vm"], "web1", "{uri}: {listed}");
    let disks = lab.shared().join("restored");
    let name = format!("back-{}", uri.split(':').next().unwrap_or_default().trim_start_matches("qemu+"));
    let disk_dir = disks.join(&name).display().to_string();
    std::fs::create_dir_all(&disk_dir).expect("a directory");
    lab.ok(&["--connect", uri, "restore", "vm", "web1@latest", "--name", &name, "--disk-dir", &disk_dir]);
    assert!(text(&lab.virsh("h1", &["list", "--all", "--name"])).contains(&name));
}

/// A certificate authority, a server's and a client's certificate in one directory, as libvirt looks for them.
fn make_certificates(dir: &Path, address: &str) {
    std::fs::create_dir_all(dir).expect("a directory");
    let script = format!(
        "cd {dir}
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=lab -keyout ca.key -out cacert.pem
        for who in server client; do
            openssl req -newkey rsa:2048 -nodes -subj /CN=$who -keyout ${{who}}key.pem -out $who.csr
            printf 'subjectAltName=IP:{address}\\nextendedKeyUsage=serverAuth,clientAuth\\n' >$who.ext
            openssl x509 -req -days 2 -in $who.csr -CA cacert.pem -CAkey ca.key -CAcreateserial -extfile $who.ext \
                -out ${{who}}cert.pem
        done",
        dir = dir.display()
    );
    let mut command = Command::new("sh");
    command.args(["-euc", &script]);
    let made = run(command, Duration::from_secs(60));
    assert!(made.status.success(), "openssl (scripts/setup.sh test): {}", text(&made));
}

#[test]
fn another_hosts_libvirt_is_reached_over_tls() {
    let (lab, address) = lab_with_vm();
    lab.backup("web1", &[]);
    let pki = lab.path("pki");
    make_certificates(&pki, &address);
    let settings = format!(
        "listen_tls = 1\nca_file = \"{0}/cacert.pem\"\ncert_file = \"{0}/servercert.pem\"\nkey_file = \"{0}/serverkey.pem\"\n",
        pki.display()
    );
    in_host(
        &lab,
        &format!(
            "sed -i '/^listen_tls/d' /etc/libvirt/libvirtd.conf; printf '{settings}' >>/etc/libvirt/libvirtd.conf"
        ),
    );
    lab.lab(&["host", "libvirtd", "restart", "h1"]);
    let uri = format!("qemu+tls://{address}/system?pkipath={}", pki.display());
    assert_works(&lab, &uri);

    // A client that another authority vouches for is no client.
    let strange = lab.path("strange");
    make_certificates(&strange, &address);
    std::fs::copy(pki.join("cacert.pem"), strange.join("cacert.pem")).expect("copy");
    let uri = format!("qemu+tls://{address}/system?pkipath={}", strange.display());
    let said = lab.fails(&["--connect", &uri, "vm", "list"], 6, &[&address]);
    assert!(!said.contains("panicked"), "{said}");
}

/// An SSH server inside the host, with keys of its own.
fn start_ssh(lab: &Lab, address: &str) -> Running {
    let dir = lab.path("ssh");
    std::fs::create_dir_all(&dir).expect("a directory");
    for key in ["host", "client"] {
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key));
        let made = run(command, Duration::from_secs(20));
        assert!(made.status.success(), "ssh-keygen (scripts/setup.sh test): {}", text(&made));
    }
    let text = format!(
        "ListenAddress {address}\nHostKey {0}/host\nAuthorizedKeysFile {0}/client.pub\nStrictModes no\nPidFile none\n\
         UsePAM no\nPermitRootLogin prohibit-password\n",
        dir.display()
    );
    std::fs::write(dir.join("sshd_config"), text).expect("a configuration file");
    let config = dir.join("sshd_config").display().to_string();
    let words = ["host", "exec", "h1", "--", "sh", "-c", "mkdir -p /run/sshd; exec /usr/sbin/sshd -D -e -f \"$0\""];
    let server = lab.start_lab(&[&words[..], &[config.as_str()]].concat());
    wait("the SSH server answers", Duration::from_secs(20), || std::net::TcpStream::connect((address, 22)).is_ok());
    server
}

#[test]
fn another_hosts_libvirt_is_reached_over_ssh() {
    let (lab, address) = lab_with_vm();
    lab.backup("web1", &[]);
    let _server = start_ssh(&lab, &address);
    // The machine's own list of known hosts stays as it is.
    let ssh = lab.path("ssh/ssh");
    let script =
        format!("#!/bin/sh\nexec ssh -F none -o UserKnownHostsFile={} \"$@\"\n", lab.path("ssh/known").display());
    std::fs::write(&ssh, script).expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&ssh, executable).expect("chmod");
    let query = format!("no_verify=1&command={}&keyfile=", ssh.display());
    let uri = format!("qemu+ssh://root@{address}/system?{query}{}", lab.path("ssh/client").display());
    assert_works(&lab, &uri);

    let nobody = format!("qemu+ssh://root@{address}/system?{query}{}", lab.path("ssh/host").display());
    let said = lab.fails(&["--connect", &nobody, "vm", "list"], 6, &[&address]);
    assert!(!said.contains("panicked"), "{said}");
}

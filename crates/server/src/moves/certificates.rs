//! Certificates for QEMU, so that memory and disks of VMs that migrate are encrypted and go to the right host.
//!
//! ```text
//! DIR/ca-cert.pem   the authority of migrations     DIR/server-cert.pem, client-cert.pem   this host's certificate
//!                                                   DIR/server-key.pem,  client-key.pem    its key, for QEMU's group
//! ```
//!
//! libvirt hands the directory to QEMU, which reads the files anew at every migration: what is renewed is used at once.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, fchown},
    path::Path,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use virtward_api::{Code, Problem, Said, Saying, Severity};
use virtward_cluster::ca::{self, Authority, NewKey, Role, Subject};
use virtward_engine::Cancel;

use crate::{
    config::MigrationCertificates,
    daemon::Daemon,
    events::Note,
    failures::Result,
    peers::{Identity, identity::problem, join::names_of},
};

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Groups that distributions give QEMU.
const GROUPS: [&str; 2] = ["libvirt-qemu", "qemu"];
const AUTHORITY: &str = "ca-cert.pem";
const CERTIFICATES: [&str; 2] = ["server-cert.pem", "client-cert.pem"];
const KEYS: [&str; 2] = ["server-key.pem", "client-key.pem"];

/// Keeps them until cancelled.
pub async fn keep(daemon: Arc<Daemon>, identity: Arc<Identity>, cancel: Cancel) {
    let mut told = None;
    loop {
        let config = daemon.config();
        if let (Some(kept), Some(cluster)) = (&config.moves.certificates, &config.cluster) {
            let addresses = names_of(cluster.address.as_deref());
            let outcome = renew(&daemon, &identity, kept, addresses).await;
            let now = outcome.as_ref().err().map(|problem| problem.detail.clone());
            if now != told {
                let dir = kept.dir.display();
                let note = match &now {
                    Some(why) => {
                        tracing::error!("certificates for migrations in {dir}: {why}");
                        let text = format!("certificates for migrations cannot be kept in {dir}: {why}");
                        let said = Said::from(Saying::MigrationCertificatesFailed).with("dir", dir.to_string());
                        Note::new(Severity::Error, "migration-certificate", text).says(said.with("why", why.as_str()))
                    }
                    None => {
                        let text = format!("certificates for migrations are kept in {dir}");
                        let said = Said::from(Saying::MigrationCertificates).with("dir", dir.to_string());
                        Note::new(Severity::Info, "migration-certificate", text).says(said)
                    }
                };
                let host = daemon.host_name();
                let about = format!("migration-certificate/{host}");
                daemon.events.add(Note { host: Some(host), ..note.about(about, now.is_none()) });
                told = now;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = cancel.cancelled() => return,
        }
    }
}

async fn renew(
    daemon: &Daemon,
    identity: &Identity,
    kept: &MigrationCertificates,
    addresses: Vec<String>,
) -> Result<()> {
    let (name, now) = (daemon.nodes.me.name.clone(), Timestamp::now());
    let store = daemon.kv.store();
    let authority = ca::migration_ca(&*store, &identity.cluster_key, now).await.map_err(|error| problem(&error))?;
    if is_good(&kept.dir, &authority, &name, now) {
        return Ok(());
    }
    let key = NewKey::generate().map_err(|error| problem(&error))?;
    let subject = Subject { name, role: Role::Migration, addresses };
    let chain = authority.issue(&key.request_der, &subject, now).map_err(|error| problem(&error))?;
    let own = chain.strip_suffix(authority.certificate_pem()).unwrap_or(&chain);
    write(kept, &authority, own, &key).map_err(|error| Problem::new(Code::Conflict, error.to_string()))
}

/// Whether what is there can be used for a while yet.
fn is_good(dir: &Path, authority: &Authority, name: &str, now: Timestamp) -> bool {
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let certificate =
        |file: &&str| ca::Identity::of_pem(&read(file)).is_ok_and(|of| of.name == name && !of.renewal_due(now));
    read(AUTHORITY) == authority.certificate_pem()
        && CERTIFICATES.iter().all(certificate)
        && read(CERTIFICATES[0]) == read(CERTIFICATES[1])
        && read(KEYS[0]) == read(KEYS[1])
        && !read(KEYS[0]).is_empty()
}

/// A migration that begins between two of these files finds a key that does not fit and fails, with the VM where it was;
/// the next one does not.
fn write(kept: &MigrationCertificates, authority: &Authority, own: &str, key: &NewKey) -> io::Result<()> {
    let group = group(kept.group.as_deref())?;
    let dir = &kept.dir;
    fs::DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
    fchown(fs::File::open(dir)?, None, group)?;
    let put = |name: &str, text: &str, mode: u32| -> io::Result<()> {
        let staged = dir.join(format!("{name}.new"));
        let _ = fs::remove_file(&staged);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&staged)?;
        file.write_all(text.as_bytes())?;
        fchown(&file, None, group)?;
        file.sync_all()?;
        fs::rename(&staged, dir.join(name))
    };
    put(AUTHORITY, authority.certificate_pem(), 0o640)?;
    KEYS.iter().try_for_each(|name| put(name, &key.key_pem, 0o640))?;
    CERTIFICATES.iter().try_for_each(|name| put(name, own, 0o640))?;
    fs::File::open(dir)?.sync_all()
}

/// The number of QEMU's group.
fn group(named: Option<&str>) -> io::Result<Option<u32>> {
    let all = fs::read_to_string("/etc/group")?;
    let number = |group: &str| {
        let mut lines = all.lines().map(|line| line.split(':'));
        lines.find_map(|mut fields| (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten())
    };
    match named {
        None => Ok(GROUPS.into_iter().find_map(number)),
        Some(group) => number(group)
            .map(Some)
            .ok_or_else(|| io::Error::other(format!("this host has no group {group}: tls-group in [moves]"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use virtward_cluster::{MemStore, ca::ClusterKey};

    use super::*;

    #[tokio::test]
    async fn what_is_missing_broken_foreign_or_old_is_made_anew() {
        let (store, key) = (MemStore::new(), ClusterKey::generate().unwrap());
        let now = Timestamp::now();
        let authority = ca::migration_ca(&store, &key, now).await.unwrap();
        let again = ca::migration_ca(&store, &key, now).await.unwrap();
        assert_eq!(again.certificate_pem(), authority.certificate_pem(), "there is one");
        let home = tempfile::tempdir().unwrap();
        let kept = MigrationCertificates { dir: home.path().join("pki/virtward"), group: None };
        let make = |name: &str, at: Timestamp| {
            let new = NewKey::generate().unwrap();
            let subject = Subject { name: name.into(), role: Role::Migration, addresses: Vec::new() };
            let chain = authority.issue(&new.request_der, &subject, at).unwrap();
            write(&kept, &authority, chain.strip_suffix(authority.certificate_pem()).unwrap(), &new).unwrap();
        };
        assert!(!is_good(&kept.dir, &authority, "h1", now));
        make("h1", now);
        assert!(is_good(&kept.dir, &authority, "h1", now));
        assert!(!is_good(&kept.dir, &authority, "h2", now), "of another node");
        let foreign = ca::migration_ca(&MemStore::new(), &key, now).await.unwrap();
        assert!(!is_good(&kept.dir, &foreign, "h1", now));
        for name in KEYS.iter().chain(&CERTIFICATES) {
            make("h1", now);
            let path = kept.dir.join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640, "{name}");
            fs::write(&path, "nonsense").unwrap();
            assert!(!is_good(&kept.dir, &authority, "h1", now), "{name}");
        }
        make("h1", now - jiff::SignedDuration::from_hours(24 * 61));
        assert!(!is_good(&kept.dir, &authority, "h1", now), "two thirds of its life are over");
        let nobody = MigrationCertificates { group: Some("no-such-group".into()), ..kept.clone() };
        assert!(group(nobody.group.as_deref()).unwrap_err().to_string().contains("no-such-group"));
    }
}

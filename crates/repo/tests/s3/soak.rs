//! Against Garage, a clustered object store. `make soak` builds it and says where it is; otherwise there is nothing to do.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use virtward_repo::{
    Error, Repository, Store,
    store::s3::{S3Options, S3Store},
    verify_ciphertext,
};

use crate::{
    common::*,
    contract::contract,
    server::{BUCKET, names},
};

const KEY: &str = "GK0123456789abcdef01234567";
const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A cluster of one node.
struct Garage {
    child: Child,
    dir: tempfile::TempDir,
    endpoint: String,
}

impl Garage {
    fn start(program: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let (rpc, api) = (port(), port());
        let root = dir.path().display();
        let config = format!(
            "metadata_dir = \"{root}/meta\"\ndata_dir = \"{root}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
             rpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{SECRET}\"\n\
             [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{api}\"\n"
        );
        std::fs::write(dir.path().join("garage.toml"), config).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .arg("-c")
            .arg(dir.path().join("garage.toml"))
            .arg("server")
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let garage = Self { child, dir, endpoint: format!("http://127.0.0.1:{api}") };
        let end = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, api)).is_err() {
            assert!(Instant::now() < end, "Garage does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let node = garage.run(program, &["node", "id", "-q"]);
        let node = node.split('@').next().unwrap().trim().to_owned();
        garage.run(program, &["layout", "assign", "-z", "here", "-c", "10G", &node]);
        garage.run(program, &["layout", "apply", "--version", "1"]);
        garage.run(program, &["bucket", "create", BUCKET]);
        garage.run(program, &["key", "import", "--yes", "-n", "test", KEY, SECRET]);
        garage.run(program, &["bucket", "allow", "--read", "--write", "--owner", BUCKET, "--key", KEY]);
        garage
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> String {
        let config = self.dir.path().join("garage.toml");
        let output = Command::new(program).arg("-c").arg(config).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn store(&self, prefix: &str, region: &str, emulate_conditions: bool) -> Arc<S3Store> {
        let options = S3Options {
            endpoint: Some(self.endpoint.clone()),
            region: Some(region.into()),
            emulate_conditions,
            ..S3Options::default()
        };
        let env = |name: &str| match name {
            "AWS_ACCESS_KEY_ID" => Some(KEY.to_owned()),
            "AWS_SECRET_ACCESS_KEY" => Some(SECRET.to_owned()),
            _ => Some("/nonexistent".to_owned()).filter(|_| name == "HOME"),
        };
        Arc::new(S3Store::open_with_env(&format!("{BUCKET}/{prefix}"), &options, &env).unwrap())
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_repository_on_garage() {
    let Some(program) = std::env::var_os("VIRTWARD_SOAK_GARAGE") else { return };
    let garage = Garage::start(Path::new(&program));
    contract(&*garage.store("contract", "garage", true));

    let wrong = garage.store("a", "elsewhere", true).list("", &mut |_| Ok(())).unwrap_err();
    assert!(wrong.to_string().contains("region"), "{wrong}");
    let refused = Repository::init(garage.store("refused", "garage", false), &secret(), &init_options()).unwrap_err();
    assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");

    let repo = init(garage.store("a", "garage", true));
    let mut image = noise(1, 1100 * CHUNK as usize);
    let full = back_up(&repo, "web1", &image).unwrap();
    for round in 0..20_usize {
        let index = round * 53 % 1100;
        image[index * CHUNK as usize] ^= 0xff;
        let base = repo.points().unwrap().points.pop().unwrap();
        let next = back_up_on(&repo, "web1", &image, Some(&base.disks[0]), &|n| n == index as u64).unwrap();
        assert!(restore(&repo, &next.disks[0]).unwrap() == image);
    }
    repo.delete_point(full.id).unwrap();
    let large = noise(2, 100 << 20);
    let store = garage.store("large", "garage", true);
    let mut writer = store.create("data/00/large").unwrap();
    writer.write(&large).unwrap();
    let _ = writer.finish().unwrap();
    assert!(store.get("data/00/large", 1 << 30).unwrap() == large);
    let many = garage.store("many", "garage", true);
    let numbers: Vec<u32> = (0..2100).collect();
    std::thread::scope(|scope| {
        for part in numbers.chunks(150) {
            let many = &many;
            scope.spawn(move || {
                for n in part {
                    let _ = many.put_if_absent(&format!("points/{n}"), b"x").unwrap();
                }
            });
        }
    });
    assert_eq!(names(&*many).len(), 2100, "listings have several pages");
    let reopened = Repository::open(garage.store("a", "garage", true), &secret()).unwrap();
    assert!(reopened.verify(&Default::default(), &()).unwrap().is_ok());
    assert!(verify_ciphertext(&**reopened.store(), 0, &()).unwrap().is_ok());
}

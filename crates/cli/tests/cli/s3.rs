//! A repository on object storage through the real binary: settings, exit statuses, and a disk there and back.

#[path = "../../../repo/tests/s3/server.rs"]
#[allow(dead_code, reason = "the store's own tests use the rest")]
mod server;

use std::fs;

use crate::common::{Ran, Sandbox, fill, finish};
use server::{ACCESS_KEY, BUCKET, SECRET_KEY, Server};

/// Runs with the credentials of the test's server and nothing of this host's.
fn run(sandbox: &Sandbox, args: &[&str]) -> Ran {
    run_as(sandbox, SECRET_KEY, args)
}

fn run_as(sandbox: &Sandbox, secret: &str, args: &[&str]) -> Ran {
    let mut command = sandbox.command(args);
    for name in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"] {
        command.env_remove(name);
    }
    command
        .env("HOME", sandbox.path("home"))
        .env("VIRTWARD_REPO", format!("s3://{BUCKET}/hosts/one"))
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", secret);
    finish(command.spawn().expect("virtward starts"))
}

#[test]
fn an_image_goes_to_a_bucket_and_comes_back() {
    let server = Server::start();
    let sandbox = Sandbox::new();
    let cache = sandbox.text("cache");
    let config = format!("cache-dir = \"{cache}\"\n[s3]\nendpoint = \"{}\"\n", server.endpoint());
    sandbox.write("etc/config.toml", &config);
    run(&sandbox, &["backup", "list"]).code(7).says("s3://backups/hosts/one is not a Virtward repository");
    run(&sandbox, &["repo", "init"]).ok();

    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    fill(&image, 0, 5 << 20, 1);
    fill(&image, 40 << 20, 4 << 20, 2);
    run(&sandbox, &["backup", "image", "disk.raw"]).ok();
    run(&sandbox, &["restore", "disk", "disk@latest", "--to", "back.raw", "--format", "raw"]).ok();
    assert!(fs::read(&image).unwrap() == fs::read(sandbox.path("back.raw")).unwrap());
    assert!(fs::read_dir(&cache).unwrap().next().is_some(), "the index is kept here too");
    run(&sandbox, &["backup", "verify", "--all"]).ok();
    run(&sandbox, &["repo", "check"]).ok();

    run(&sandbox, &["backup", "delete", "disk@latest", "--yes", "--append-only"]).code(11).says("append-only");
    sandbox.write("etc/config.toml", format!("append-only = true\n{config}"));
    run(&sandbox, &["backup", "image", "disk.raw"]).ok();
    run(&sandbox, &["backup", "delete", "disk@latest", "--yes"]).code(11);
    let listed = run(&sandbox, &["backup", "list", "--json"]).ok().json();
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");

    let denied = run_as(&sandbox, "not-the-secret", &["backup", "list", "--json"]).code(11);
    assert!(denied.error()["hint"].as_str().unwrap().contains("AWS_SECRET_ACCESS_KEY"), "{}", denied.stdout);
    let nowhere = run(&sandbox, &["backup", "list", "--repo", "s3://nowhere/x"]).code(7);
    nowhere.says("there is no bucket nowhere");
}

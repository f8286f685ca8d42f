//! The web interface before a real host: a browser, the daemon as it is installed, libvirt, QEMU and a guest.

use std::{
    net::TcpListener,
    process::{Child, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use virtward_api::client::Client;

use crate::{
    browser::Browser,
    harness::{CHECKSUMS, Lab, wait},
};

/// Killed when the test ends, however it ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Due only when somebody asks for it, and slow enough to be watched.
const POLICY: &str = "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"name:web*\"]\n\
                      quiesce = \"required\"\nbandwidth = \"4MiB\"\nretention = { keep-last = 5 }\n\
                      schedule = { cron = \"* * * * *\", time-zone = \"UTC\" }\n";

#[test]
fn a_person_protects_a_guest_in_the_browser_watches_it_and_gets_it_back() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
    let path = |name: &str| lab.path(name).display().to_string();
    let more = format!(
        "[server]\nstate-dir = {:?}\nreconcile-s = 5\nlisten = \"127.0.0.1:{port}\"\n\
         [repositories.gone]\nlocation = {:?}\nkey-file = {:?}\n",
        path("state"),
        path("gone"),
        path("repo.key")
    );
    lab.write_config("h1", &more);
    let command = lab.virtward(&["serve"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _daemon = Daemon(command.expect("the daemon starts"));
    let status = || -> Value { serde_json::from_slice(&lab.output(&["status", "--json"]).stdout).unwrap_or_default() };
    wait("the daemon to see the guest", Duration::from_secs(60), || status()["vms"]["running"] == 1);
    let token: Value =
        serde_json::from_str(&lab.ok(&["token", "create", "anna", "--role", "admin", "--json"])).unwrap();
    let before = lab.guest_sh("web1", CHECKSUMS);

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let browser = Browser::start(format!("https://127.0.0.1:{port}")).await;
        log_in(&browser, token["secret"].as_str().unwrap()).await;
        protects(&browser).await;
        restores(&browser).await;
        finds_a_failure(&browser, &Client::unix(lab.path("run/api.sock"))).await;
        assert_eq!(browser.complaints().await, Vec::<String>::new());
    });
    lab.lab(&["vm", "wait", "web1-copy"]);
    assert!(lab.guest_sh("web1-copy", CHECKSUMS) == before, "the copy's files differ");
    lab.ok(&["policy", "delete", "gold"]);
    wait("jobs to end", Duration::from_secs(120), || {
        lab.ok(&["job", "list", "--state", "running,queued", "--json"]).trim() == "[]"
    });
    lab.assert_nothing_left("h1", "web1");
}

async fn log_in(browser: &Browser, token: &str) {
    browser.open("/").await;
    browser.write("#token", token).await;
    browser.click("button[type=submit]", "Log in").await;
    browser.until("the overview", "document.querySelector('nav [aria-current=page]')").await;
}

/// A policy is written; the backup that it makes is watched to its end.
async fn protects(browser: &Browser) {
    browser.page("/policies/+new").await;
    browser.write("#source", POLICY).await;
    browser.click("main button", "Preview changes").await;
    browser.sees("gold is new.").await;
    browser.click("main button", "Apply").await;
    browser.until("its page", "location.pathname === '/policies/gold'").await;
    browser.page("/jobs").await;
    browser.click("tbody a", "Backup").await;
    let steps = "new Set(window.steps ??= []).size";
    let note = "(() => { const bar = document.querySelector('[role=progressbar]'); window.steps ??= []; \
                if (bar) window.steps.push(bar.getAttribute('aria-valuenow')); })()";
    browser.until("the bar to move", &format!("({note}, {steps} >= 3)")).await;
    assert_eq!(ended(browser).await, "succeeded");
}

/// The state of the job that the page shows, once it has ended.
async fn ended(browser: &Browser) -> String {
    let chip = "document.querySelector('main h1 ~ .chip, main .card .chip')";
    let states = "['succeeded', 'failed', 'cancelled', 'interrupted']";
    browser.until("the job to end", &format!("{states}.includes({chip}?.dataset.state)")).await;
    browser.run(&format!("return {chip}.dataset.state"), json!([])).await.as_str().unwrap().to_owned()
}

async fn restores(browser: &Browser) {
    browser.page("/vms/web1").await;
    browser.click("td a", "Restore").await;
    browser.write("input[name=name]", "web1-copy").await;
    browser.click("label", "Start it when").await;
    browser.click("button[type=submit]", "Show what would happen").await;
    browser.sees("Nothing was changed yet.").await;
    browser.click("main button", "Restore").await;
    assert_eq!(ended(browser).await, "succeeded");
    browser.click("main a", "Open VM").await;
    browser.until("the new VM", "document.querySelector('h1')?.textContent === 'web1-copy'").await;
}

async fn finds_a_failure(browser: &Browser, api: &Client) {
    let request = json!({"vm": "web1", "repository": "gone"});
    let _: Value = api.post("/api/v1/jobs/backup", &request, None).await.expect("a job");
    browser.page("/jobs").await;
    browser.click("button.choice", "Failed").await;
    browser.click("tbody a", "Backup").await;
    assert_eq!(ended(browser).await, "failed");
    let alert = browser.run("return document.querySelector('[role=alert]').innerText", json!([])).await;
    assert!(alert.as_str().is_some_and(|text| text.contains("gone")), "{alert}");
}

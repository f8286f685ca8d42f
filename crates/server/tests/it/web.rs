//! The web interface as people meet it: a real browser, the real daemon over HTTPS, simulated hosts.

use serde_json::{Value, json};
use virtward_api::Role;
use virtward_model::Bytes;
use virtward_server::config::{Config, RepositoryConfig};

use crate::{
    browser::Browser,
    common::{Daemon, Place},
};

async fn browser(daemon: &Daemon) -> Browser {
    let port = daemon.listening.https.expect("HTTPS is on").port();
    Browser::start(format!("https://127.0.0.1:{port}")).await
}

async fn log_in(browser: &Browser, daemon: &Daemon, role: Role) {
    let token = daemon.token("anna", role, &[]).await;
    browser.open("/").await;
    browser.write("#token", &token).await;
    browser.click("button[type=submit]", "Log in").await;
    browser.until("the overview", "document.querySelector('nav [aria-current=page]')").await;
}

/// The state of the job that the page shows, once it has ended.
async fn ended(browser: &Browser) -> String {
    let states = "['succeeded', 'failed', 'cancelled', 'interrupted']";
    let chip = "document.querySelector('main h1 ~ .chip, main .card .chip')";
    browser.until("the job to end", &format!("{states}.includes({chip}?.dataset.state)")).await;
    browser.run(&format!("return {chip}.dataset.state"), json!([])).await.as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_logs_in_backs_a_vm_up_watches_it_and_restores_it() {
    let place = Place::new();
    place.vm("web1", &["gold"], 48).await;
    place.vm("&lt;i&gt;web2", &[], 1).await;
    let mut config = place.config();
    // Slow enough to be watched.
    config.backup.bandwidth = Some(Bytes(16 << 20));
    let daemon = place.start_with(config).await;
    let browser = browser(&daemon).await;

    browser.open("/vms").await;
    browser.write("#token", "vwt_wrong").await;
    browser.click("button[type=submit]", "Log in").await;
    browser.sees("Not logged in").await;
    log_in(&browser, &daemon, Role::Operator).await;

    browser.click("nav a", "VMs").await;
    browser.sees("web1").await;
    // A name is a name, whatever is in it.
    browser.sees("<i>web2").await;
    browser.write("input[type=search]", "web1").await;
    browser.until("only one VM", "document.querySelectorAll('tbody tr').length === 1").await;
    browser.click("tbody a", "web1").await;
    browser.sees("There are no restore points yet.").await;

    // Every step that the bar takes is noted, so that a quick backup is seen as well.
    let note = "window.steps = []; new MutationObserver(() => { for (const bar of document.querySelectorAll('[role=progressbar]')) \
                window.steps.push(Number(bar.getAttribute('aria-valuenow'))); }).observe(document.body, \
                { childList: true, subtree: true, attributes: true });";
    browser.run(note, json!([])).await;
    browser.click("main button", "Back up now").await;
    browser.click("dialog button", "Start backup").await;
    browser.click("td a", "Backup").await;
    assert_eq!(ended(&browser).await, "succeeded");
    let steps = browser.run("return window.steps", json!([])).await;
    assert!(!steps.as_array().unwrap().is_empty(), "no progress was shown");
    browser.sees("Done").await;
    browser.sees("48.0 MiB").await;

    browser.page("/vms/web1").await;
    browser.click("td a", "Restore").await;
    browser.sees("A new VM beside the original").await;
    browser.write("input[name=name]", "web1-copy").await;
    browser.click("button[type=submit]", "Show what would happen").await;
    browser.sees("Nothing was changed yet.").await;
    browser.sees("web1-copy-vda.raw").await;
    assert!(!daemon.place.path("web1-copy-vda.raw").exists(), "looking wrote");
    browser.click("main button", "Restore").await;
    assert_eq!(ended(&browser).await, "succeeded");
    browser.click("main a", "Open VM").await;
    browser.until("the new VM", "document.querySelector('h1')?.textContent === 'web1-copy'").await;
    let (one, other) = (daemon.place.path("web1.raw"), daemon.place.path("web1-copy-vda.raw"));
    assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap(), "the copy differs");
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    drop(browser);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_found_with_its_reason_and_a_viewer_changes_nothing() {
    let place = Place::new();
    place.vm("web1", &[], 1).await;
    let config = place.config();
    let gone = RepositoryConfig {
        name: "gone".into(),
        location: place.path("gone").display().to_string(),
        ..config.repositories[0].clone()
    };
    let config = Config { repositories: vec![config.repositories[0].clone(), gone], ..config };
    let daemon = place.start_with(config).await;
    let job = daemon.post("/api/v1/jobs/backup", json!({"vm": "web1", "repository": "gone"})).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!(job["state"], "failed", "{job}");

    let browser = browser(&daemon).await;
    log_in(&browser, &daemon, Role::Viewer).await;
    browser.sees("Failures of the last 7 days").await;
    let reason = job["error"]["message"].as_str().unwrap();
    browser.sees(reason).await;
    browser.click("nav a", "Jobs").await;
    browser.click("button.choice", "Failed").await;
    browser.click("tbody a", "Backup").await;
    assert_eq!(ended(&browser).await, "failed");
    let alert = browser.run("return document.querySelector('[role=alert]').innerText", json!([])).await;
    let alert = alert.as_str().unwrap();
    assert!(alert.contains(reason), "{alert}");
    assert!(job["error"]["hint"].as_str().is_none_or(|hint| alert.contains(hint)), "{alert}");
    // The same in Chinese: what the page knows is said in it, what somebody else said stays as it was.
    browser.run("localStorage.setItem('virtward-language', 'zh-TW')", json!([])).await;
    browser.page("/events").await;
    browser.sees("web1：備份失敗：").await;
    browser.sees(reason).await;
    browser.page("/").await;
    browser.sees("沒有任何原則選取它").await;
    browser.run("localStorage.setItem('virtward-language', 'en')", json!([])).await;
    browser.page("/vms/web1").await;
    let buttons =
        browser.run("return [...document.querySelectorAll('main button')].map(b => b.textContent)", json!([])).await;
    assert!(!buttons.to_string().contains("Back up"), "{buttons}");
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    drop(browser);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_written_checked_previewed_and_applied() {
    let place = Place::new();
    place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    let browser = browser(&daemon).await;
    log_in(&browser, &daemon, Role::Admin).await;
    browser.click("nav a", "Policies").await;
    browser.click("main a", "New policy").await;
    browser.sees("Selects").await;

    let text = |cron: &str| {
        format!(
            "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"tag:gold\"]\n\
             retention.keep-last = 2\n[policy.schedule]\ncron = \"{cron}\"\ntime-zone = \"UTC\"\n"
        )
    };
    browser.write("#source", &text("61 0 * * *")).await;
    browser.sees("line 7").await;
    assert!(browser.run("return document.querySelector('.head .primary').disabled", json!([])).await == true);
    browser.click(".findings button", "line 7").await;
    let chosen = "const area = document.getElementById('source'); \
                  return area.value.slice(area.selectionStart, area.selectionEnd)";
    assert_eq!(browser.run(chosen, json!([])).await, "cron = \"61 0 * * *\"");
    browser.write("#source", &text("1 0 1 1 *")).await;
    browser.until("it to be valid", "!document.querySelector('.findings')").await;
    browser.click("main button", "Preview changes").await;
    browser.sees("gold is new.").await;
    assert_eq!(daemon.get("/api/v1/policies").await, json!([]), "looking applied it");
    browser.click("main button", "Apply").await;
    browser.until("its page", "location.pathname === '/policies/gold'").await;
    browser.page("/vms/web1").await;
    browser.sees("gold").await;
    let policy = daemon.get("/api/v1/policies/gold").await;
    assert_eq!((&policy["updated_by"], &policy["vms"][0]["name"]), (&json!("anna"), &json!("web1")), "{policy}");
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    drop(browser);
    daemon.end().await;
}

/// What a page must have so that it can be used without seeing it, or without a mouse, or on a phone.
const USABLE: &str = r#"
    const wrong = [];
    const label = (one) => one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.[0]?.textContent.trim() || one.title;
    for (const one of document.querySelectorAll('a[href], button, input, select, textarea, table, [role=img], [role=progressbar], [role=meter]'))
        if (!label(one)) wrong.push('no name: ' + one.outerHTML.slice(0, 200));
    for (const name of ['main', 'nav', 'h1', '.skip'])
        if (!document.querySelector(name)) wrong.push('no ' + name);
    if (document.querySelectorAll('h1').length !== 1) wrong.push('not one h1');
    const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
    if (new Set(ids).size !== ids.length) wrong.push('an id twice');
    for (const one of document.querySelectorAll('[tabindex]')) if (one.tabIndex > 0) wrong.push('own order of focus');
    for (const time of document.querySelectorAll('time')) if (!time.title || !time.dateTime) wrong.push('a time without the time');
    const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    if (over > 0) wrong.push('wider than the screen by ' + over);
    // What is code, such as the audited action job.backup, is no text that is missing.
    const code = [...document.querySelectorAll('code')].map((one) => one.innerText);
    const words = code.reduce((text, one) => text.replaceAll(one, ''), document.body.innerText).match(/\b(nav|vms?|jobs?|hosts|policies|repository|settings|cluster|overview|events|audit|tokens|list|action|problem)\.[a-z-]+\b/);
    if (words) wrong.push('a text is missing: ' + words[0]);
    return wrong;
"#;

#[tokio::test(flavor = "multi_thread")]
async fn every_page_is_usable_on_a_phone_in_both_languages_and_in_the_dark() {
    let place = Place::new();
    let uuid = place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    let job = daemon.backup("web1").await;
    let source = "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"tag:gold\"]\n\
                  retention.keep-last = 2\nschedule.cron = \"1 0 1 1 *\"\nschedule.time-zone = \"UTC\"\n";
    let client = daemon.client.clone();
    client.put::<Value>("/api/v1/policies/gold", &json!({"source": source}), None).await.unwrap();
    let browser = browser(&daemon).await;
    log_in(&browser, &daemon, Role::Admin).await;
    let pages = [
        "/".to_owned(),
        "/vms".into(),
        format!("/vms/{uuid}"),
        format!("/vms/{uuid}/restore"),
        "/hosts".into(),
        "/hosts/h1".into(),
        "/cluster".into(),
        "/ha".into(),
        "/balance".into(),
        "/jobs".into(),
        format!("/jobs/{}", job["id"].as_str().unwrap()),
        "/policies".into(),
        "/policies/gold".into(),
        "/policies/+new".into(),
        "/repositories".into(),
        "/repositories/default".into(),
        "/events".into(),
        "/audit".into(),
        "/settings".into(),
    ];
    for (language, theme, width) in
        [("en", "light", 1280), ("en", "dark", 320), ("zh-TW", "dark", 1280), ("zh-TW", "light", 320)]
    {
        browser.resize(width, 720).await;
        let choose = "localStorage.setItem('virtward-language', arguments[0]); localStorage.setItem('virtward-theme', arguments[1])";
        browser.run(choose, json!([language, theme])).await;
        for page in &pages {
            browser.page(page).await;
            let wrong = browser.run(USABLE, json!([])).await;
            assert_eq!(wrong, json!([]), "{page} in {language}, {theme}, {width} pixels");
            let shown = "return [document.documentElement.lang, document.documentElement.dataset.theme]";
            assert_eq!(browser.run(shown, json!([])).await, json!([language, theme]));
        }
        assert_eq!(browser.complaints().await, Vec::<String>::new());
    }
    drop(browser);
    daemon.end().await;
}

/// Where the focus is: what of it cannot be seen, and whether it went round.
const FOCUS: &str = r#"
    window.met ??= new Set();
    const one = document.activeElement;
    if (!one || one === document.body || window.met.has(one)) return 'round';
    window.met.add(one);
    const shown = (element) => { const style = getComputedStyle(element); return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0; };
    const box = one.getBoundingClientRect();
    if (one.closest('svg')) return '';
    if (box.bottom < 0 || box.top > innerHeight) return 'out of sight: ' + one.outerHTML.slice(0, 200);
    return shown(one) ? '' : 'not seen: ' + one.outerHTML.slice(0, 200);
"#;
/// What can be used with a mouse and was not met by keyboard. Of several radio buttons one is met.
const UNMET: &str = r#"
    const all = document.querySelectorAll('a[href], button, input:not([type=radio]), select, textarea, summary');
    return [...all].filter((one) => !one.disabled && one.checkVisibility() && !window.met.has(one)).map((one) => one.outerHTML.slice(0, 200));
"#;

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_no_mouse_gets_everywhere_and_sees_where_they_are() {
    const STEPS_MAX: usize = 120;
    let place = Place::new();
    place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    daemon.backup("web1").await;
    let browser = browser(&daemon).await;
    log_in(&browser, &daemon, Role::Admin).await;
    for page in ["/", "/vms", "/vms/web1", "/hosts", "/hosts/h1", "/cluster", "/jobs", "/events", "/audit", "/settings"]
    {
        browser.page(page).await;
        let mut is_round = false;
        for _ in 0..STEPS_MAX {
            browser.tab().await;
            let found = browser.run(FOCUS, json!([])).await;
            match found.as_str().unwrap_or_default() {
                "" => {}
                "round" => {
                    is_round = true;
                    break;
                }
                wrong => panic!("{page}: {wrong}"),
            }
        }
        assert!(is_round, "{page}: the focus is caught, or there is too much on the page");
        assert_eq!(browser.run(UNMET, json!([])).await, json!([]), "{page}");
    }
    drop(browser);
    daemon.end().await;
}

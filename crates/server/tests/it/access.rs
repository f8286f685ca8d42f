//! Who may do what, and how they prove who they are.

use serde_json::{Value, json};
use virtward_api::{Code, Role, routes};

use crate::common::{Place, problem, send};

#[tokio::test(flavor = "multi_thread")]
async fn every_route_asks_for_its_role_and_nobody_gets_in_without() {
    let daemon = Place::new().start().await;
    let tokens = [
        (Role::Viewer, daemon.token("viewer", Role::Viewer, &[]).await),
        (Role::Operator, daemon.token("operator", Role::Operator, &[]).await),
    ];
    let nobody = daemon.https(None);
    let wrong = daemon.https(Some("vwt_0000_1111".into()));
    let mut wrong_tries = 0;
    for route in routes::ROUTES {
        let path = route.path.replace("{", "").replace("}", "");
        let routes::Access::Role(needs) = route.access else { continue };
        if route.name == "stream" {
            continue;
        }
        let answer = send(&nobody, route.method.as_str(), &path, &[], None).await;
        problem(&answer, Code::Unauthenticated);
        if wrong_tries < 5 {
            problem(&send(&wrong, route.method.as_str(), &path, &[], None).await, Code::Unauthenticated);
            wrong_tries += 1;
        }
        for (role, token) in &tokens {
            let answer = send(&daemon.https(Some(token.clone())), route.method.as_str(), &path, &[], None).await;
            let refused = answer.status == 403;
            assert_eq!(refused, *role < needs, "{role:?} {} {path}: {}", route.method.as_str(), answer.status);
        }
    }
    // Every answer carries the headers that keep a browser honest.
    let answer = send(&nobody, "GET", "/healthz", &[], None).await;
    assert_eq!(answer.status, 200);
    let policy = answer.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
    for (name, value) in
        [("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"), ("cache-control", "no-store")]
    {
        assert_eq!(answer.headers[name], value);
    }
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_session_needs_its_csrf_token_and_ends() {
    let daemon = Place::new().start().await;
    let token = daemon.token("me", Role::Admin, &[]).await;
    let browser = daemon.https(None);
    let answer = send(&browser, "POST", "/api/v1/session", &[], Some(json!({ "token": token }))).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let cookie = answer.headers["set-cookie"].to_str().unwrap().to_owned();
    for flag in ["HttpOnly", "Secure", "SameSite=Strict", "Path=/"] {
        assert!(cookie.contains(flag), "{cookie}");
    }
    let cookie = cookie.split(';').next().unwrap().to_owned();
    let audit = daemon.get("/api/v1/audit?action=session.login").await;
    let entry = &audit["items"][0];
    assert_eq!(
        (&entry["who"], &entry["via"], &entry["status"]),
        (&json!("me"), &json!("session"), &json!(200)),
        "{entry}"
    );
    let made = daemon.get("/api/v1/audit?action=token.create").await;
    assert!(made["items"][0]["detail"].as_str().unwrap().ends_with(", admin)"), "{made}");
    let session: Value = serde_json::from_slice(&answer.body).unwrap();
    let csrf = session["principal"]["csrf_token"].as_str().unwrap().to_owned();
    let whoami = send(&browser, "GET", "/api/v1/whoami", &[("cookie", &cookie)], None).await;
    let whoami: Value = serde_json::from_slice(&whoami.body).unwrap();
    assert_eq!(
        (&whoami["name"], &whoami["kind"], &whoami["csrf_token"]),
        (&json!("me"), &json!("session"), &json!(csrf))
    );

    let new = json!({"name": "other", "role": "viewer"});
    let without = send(&browser, "POST", "/api/v1/tokens", &[("cookie", &cookie)], Some(new.clone())).await;
    problem(&without, Code::CsrfRequired);
    let forged = [("cookie", cookie.as_str()), ("x-csrf-token", "0000")];
    problem(&send(&browser, "POST", "/api/v1/tokens", &forged, Some(new.clone())).await, Code::CsrfRequired);
    let good = [("cookie", cookie.as_str()), ("x-csrf-token", csrf.as_str())];
    assert_eq!(send(&browser, "POST", "/api/v1/tokens", &good, Some(new)).await.status, 201);

    assert_eq!(send(&browser, "DELETE", "/api/v1/session", &good, None).await.status, 204);
    problem(&send(&browser, "GET", "/api/v1/whoami", &[("cookie", &cookie)], None).await, Code::Unauthenticated);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_log_ins_are_limited_and_recorded() {
    let daemon = Place::new().start().await;
    let good = daemon.token("me", Role::Admin, &[]).await;
    let browser = daemon.https(None);
    for _ in 0..10 {
        let answer = send(&browser, "POST", "/api/v1/session", &[], Some(json!({"token": "vwt_x_y"}))).await;
        problem(&answer, Code::Unauthenticated);
    }
    // Now the right one does not help either.
    let limited = send(&browser, "POST", "/api/v1/session", &[], Some(json!({ "token": good }))).await;
    assert!(problem(&limited, Code::RateLimited).hint.unwrap().contains("seconds"));
    problem(&send(&daemon.https(Some(good)), "GET", "/api/v1/vms", &[], None).await, Code::RateLimited);
    // The socket of the host is not locked out.
    let audit = daemon.get("/api/v1/audit?action=session.login").await;
    let entries = audit["items"].as_array().unwrap();
    assert_eq!(entries.len(), 11);
    assert!(entries.iter().all(|entry| entry["who"] == "nobody" && entry["address"] == "127.0.0.1"), "{audit}");
    assert!(!audit.to_string().contains("vwt_x_y"), "a secret is in the audit log");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_in_the_audit_log_also_when_refused() {
    let daemon = Place::new().start().await;
    let viewer = daemon.token("viewer", Role::Viewer, &[]).await;
    let viewer = daemon.https(Some(viewer));
    problem(&send(&viewer, "DELETE", "/api/v1/tokens/viewer", &[], None).await, Code::Forbidden);
    assert_eq!(send(&daemon.client, "DELETE", "/api/v1/tokens/viewer", &[], None).await.status, 204);
    problem(&send(&viewer, "GET", "/api/v1/vms", &[], None).await, Code::Unauthenticated);
    let audit = daemon.get("/api/v1/audit").await;
    let seen: Vec<(String, u64)> = audit["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["action"].as_str().unwrap().to_owned(), entry["status"].as_u64().unwrap()))
        .collect();
    let expected = [("token.revoke", 204), ("token.revoke", 403), ("token.create", 201)];
    assert_eq!(seen, expected.map(|(action, status)| (action.to_owned(), status)));
    assert_eq!(audit["items"][0]["target"], "viewer");
    // It goes on after a restart.
    let place = daemon.end().await;
    let daemon = place.start().await;
    assert_eq!(daemon.get("/api/v1/audit").await["items"].as_array().unwrap().len(), 3);
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_tags_restores_only_vms_with_them() {
    let place = Place::new();
    place.vm("shop1", &["shop"], 1).await;
    place.vm("bank1", &["bank"], 1).await;
    let daemon = place.start().await;
    daemon.backup("shop1").await;
    daemon.backup("bank1").await;
    let token = daemon.token("shop-team", Role::Operator, &["shop"]).await;
    let team = daemon.https(Some(token));
    let ask = |point: &str, name: &str| {
        let (team, body) = (team.clone(), json!({"point": point, "name": name, "overwrite": true, "dry_run": true}));
        async move { send(&team, "POST", "/api/v1/jobs/restore", &[], Some(body)).await }
    };
    assert_eq!(ask("shop1@latest", "shop1-copy").await.status, 200);
    problem(&ask("bank1@latest", "bank1-copy").await, Code::Forbidden);
    problem(&ask("shop1@latest", "bank1").await, Code::Forbidden);
    daemon.end().await;
}

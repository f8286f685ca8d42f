//! The policy file: good ones, and what is said of bad ones.

use std::collections::BTreeSet;

use jiff::tz::TimeZoneDatabase;
use proptest::prelude::*;
use virtward_model::{Weekday, select::Rule};

use super::*;

fn read(text: &str) -> Result<Vec<Policy>, Vec<String>> {
    let zones = TimeZoneDatabase::bundled();
    let repositories = BTreeSet::from(["main".to_owned(), "offsite".to_owned()]);
    let hosts = BTreeSet::from(["kvm1".to_owned(), "backup1".to_owned()]);
    let known = Known { zones: &zones, repositories: Some(&repositories), hosts: Some(&hosts) };
    parse("p.toml", text, &known).map_err(|problems| problems.iter().map(Problem::to_string).collect())
}

/// A good policy with one line put in, or one of its lines replaced by another with the same key.
fn with(section: &str, line: &str) -> String {
    let mut text = String::from("[[policy]]\n");
    let base = [
        ("", "name = \"gold\""),
        ("", "repository = \"main\""),
        ("select", "any = [\"name:*\"]"),
        ("schedule", "cron = \"30 1 * * *\""),
        ("schedule", "time-zone = \"UTC\""),
        ("retention", "keep-daily = 7"),
    ];
    let key = |line: &str| line.split('=').next().unwrap().trim().to_owned();
    for name in ["", "select", "schedule", "retention", "hooks", "retries"] {
        let lines: Vec<&str> = base.iter().filter(|(at, _)| *at == name).map(|(_, line)| *line).collect();
        let kept = lines.into_iter().filter(|kept| section != name || key(kept) != key(line));
        let lines: Vec<&str> = kept.chain((section == name && line.contains('=')).then_some(line)).collect();
        if !name.is_empty() && !lines.is_empty() {
            text += &format!("[policy.{name}]\n");
        }
        lines.iter().for_each(|line| text += &format!("{line}\n"));
    }
    text
}

#[test]
fn the_example_is_good_and_means_what_its_comments_say() {
    let text = include_str!("../../../../../docs/examples/policies.toml");
    let policies = read(text).unwrap_or_else(|problems| panic!("{}", problems.join("\n")));
    assert_eq!(policies.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["nightly", "databases", "archive"]);
    let databases = &policies[1];
    assert_eq!((databases.priority, databases.quiesce), (50, QuiesceRequest::Required));
    assert_eq!((databases.bandwidth, databases.timeout), (Some(Bytes::mib(200)), Some(Seconds::minutes(50))));
    assert_eq!(databases.select.any[0], "tag:database".parse::<Rule>().unwrap());
    assert!(!databases.schedule.catch_up && policies[0].schedule.catch_up);
    assert_eq!(databases.copy_to[0].retention.yearly, 7);
    assert_eq!(policies[2].schedule.window.as_ref().unwrap().days, [Weekday::Sat, Weekday::Sun]);
    assert_eq!(read(&render(&policies).unwrap()).unwrap(), policies);
}

/// What the operator's page shows is a good policy file, and the messages that it quotes are those that are given.
#[test]
fn the_page_shows_what_is_true() {
    let page = include_str!("../../../../../docs/policies.md");
    let (_, shown) = page.split_once("```toml\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    assert_eq!(read(shown).unwrap_or_else(|problems| panic!("{}", problems.join("\n")))[0].name, "nightly");
    let quoted = page.lines().filter_map(|line| line.trim().strip_prefix("policies.toml:"));
    let quoted: Vec<&str> = quoted.filter_map(|line| line.split_once(": ")).map(|(_, message)| message).collect();
    assert_eq!(quoted.len(), 3);
    let mistakes =
        [("", "repositry = \"x\""), ("schedule", "cron = \"0 25 * * *\""), ("schedule", "time-zone = \"Berlin\"")];
    for (message, (section, line)) in quoted.into_iter().zip(mistakes) {
        let problems = read(&with(section, line)).unwrap_err();
        assert!(problems.iter().any(|problem| problem.ends_with(&format!(": {message}"))), "{message}: {problems:#?}");
    }
}

#[test]
fn every_mistake_is_named_with_its_place_and_advice() {
    assert!(read(&with("", "")).is_ok());
    for (section, line, says) in [
        ("", "prioritty = 3", "p.toml:4:1: unknown field \"prioritty\" in [policy]; did you mean priority?"),
        ("", "priority = \"high\"", "p.toml:4:12: priority is a text; write a whole number, without quotes"),
        ("", "priority = 101", "p.toml:4:12: priority 101 is not from -100 to 100"),
        ("", "priority = 1000", "p.toml:4:12: 1000 is out of range for priority"),
        ("", "name = \"my policy\"", "p.toml:3:8: \"my policy\" is not a name for a policy; use letters"),
        ("", "repository = \"mian\"", "p.toml:3:14: there is no repository \"mian\"; did you mean main?"),
        ("", "mode = \"cold\"", "p.toml:4:8: \"cold\" is not a mode; write one of auto, warm"),
        ("", "quiesce = true", "p.toml:4:11: quiesce is true or false; write one of \"auto\", \"required\", \"off\""),
        ("", "bandwidth = \"fast\"", "p.toml:4:13: \"fast\" is not a size"),
        ("", "bandwidth = 0", "p.toml:4:13: a limit of nothing would never end; leave it out"),
        ("", "proxy = \"bakcup1\"", "p.toml:4:9: there is no host \"bakcup1\"; did you mean backup1?"),
        ("", "proxy = [\"kvm1\", \"x\"]", "p.toml:4:18: there is no host \"x\"; known hosts: backup1, kvm1"),
        ("", "proxy = [\"kvm1\", \"kvm1\"]", "p.toml:4:18: host \"kvm1\" is named twice; remove one"),
        ("", "proxy = [\"\"]", "p.toml:4:10: no host is named; for example proxy ="),
        ("", "proxy = 1", "p.toml:4:9: proxy is a number"),
        ("", "timeout = \"6\"", "p.toml:4:11: \"6\" is not a length of time; write numbers with units"),
        ("", "rpo = \"24h\"", "p.toml:4:7: the objective is 1d, but up to 1d pass between two runs"),
        ("", "rpo = \"0s\"", "p.toml:4:7: rpo is no time at all"),
        ("select", "any = []", "p.toml:4:1: the policy selects no VM; for every VM write any = [\"name:*\"]"),
        ("select", "any = [\"web*\"]", "p.toml:5:8: \"web*\" is not a rule; write name:PATTERN"),
        ("select", "any = \"name:*\"", "p.toml:5:7: any is a text; write a list, such as [\"name:web-*\"]"),
        ("select", "exclude = [\"name:*\"]", "p.toml:6:11: all that is selected is excluded again"),
        ("schedule", "cron = \"61 * * * *\"", "\"61\" in the field minute is not 0 to 59"),
        ("schedule", "cron = [\"@daily\", \"@nightly\"]", "p.toml:8:19: \"@nightly\" is not a cron expression"),
        ("schedule", "cron = []", "p.toml:8:8: no time is given; for example cron ="),
        ("schedule", "cron = \"0 0 30 2 *\"", "never run"),
        (
            "schedule",
            "time-zone = \"Europe/Berlni\"",
            "p.toml:8:13: there is no time zone \"Europe/Berlni\"; did you mean Europe/Berlin?",
        ),
        ("schedule", "time-zone = \"Berlin\"", "did you mean Europe/Berlin?"),
        (
            "schedule",
            "window = { start = \"22:00\", end = \"22:00\" }",
            "ends when it starts, at 22:00; leave the window out",
        ),
        (
            "schedule",
            "window = { start = \"12:00\", end = \"13:00\" }",
            "p.toml:9:10: no run falls into the window 12:00 to 13:00",
        ),
        ("schedule", "window = { start = \"25:00\", end = \"13:00\" }", "p.toml:9:20: \"25:00\" is not a time of day"),
        (
            "schedule",
            "window = { start = \"01:00\" }",
            "p.toml:9:10: [policy.schedule.window] has no end; for example end = \"22:30\"",
        ),
        ("schedule", "window = { start = 01:00:00, end = \"02:00\" }", "start is a date or time (put it in quotes)"),
        (
            "schedule",
            "window = { start = \"01:00\", end = \"02:00\", days = [\"monday\"] }",
            "\"monday\" is not a day of the week",
        ),
        ("schedule", "catch-up = \"yes\"", "catch-up is a text; write true or false, without quotes"),
        ("schedule", "jitter = \"24h\"", "jitter 1d is not shorter than the 1d between two runs"),
        ("schedule", "max-lateness = \"0s\"", "no run could ever start in time"),
        ("retention", "keep-daily = 0", "p.toml:9:1: the retention keeps nothing; for example keep-daily = 7"),
        (
            "retention",
            "keep-dayly = 7",
            "unknown field \"keep-dayly\" in [policy.retention]; did you mean keep-daily or keep-yearly?",
        ),
        ("retention", "keep-within = \"6m\"", "for months write mo"),
        ("retries", "count = 99", "99 retries are too many; 20 at most"),
        ("retries", "backoff = \"1s\"", "wait at least 10s"),
        ("hooks", "pre-freeze = \" \"", "the command is empty"),
    ] {
        let problems = read(&with(section, line)).expect_err(line);
        assert_eq!(problems.len(), 1, "{line}: {problems:#?}");
        assert!(problems[0].contains(says), "{line}: {}", problems[0]);
    }
}

#[test]
fn all_that_is_missing_is_named_at_once_and_nothing_twice() {
    let problems = read("# none\n[[policy]]\n").unwrap_err();
    let at = |what: &str| problems.iter().filter(|problem| problem.contains(what)).count();
    for what in ["no name", "no repository", "selects no VM", "no time is given", "no time zone", "keeps nothing"] {
        assert_eq!(at(what), 1, "{what}: {problems:#?}");
    }
    assert_eq!((problems.len(), at("p.toml:2:1: ")), (6, 6), "{problems:#?}");
    let two = format!("{}\n{}", with("", "prioritty = 1"), with("schedule", "cron = 5"));
    let problems = read(&two).unwrap_err();
    assert_eq!(problems.len(), 3, "{problems:#?}");
    assert!(problems[0].starts_with("p.toml:4:1: unknown field"), "{problems:#?}");
    assert!(problems[1].contains("policy 1 of this set is called \"gold\" as well"), "{problems:#?}");
    assert!(problems[2].contains("cron is a number"), "{problems:#?}");
}

#[test]
fn copies_are_checked() {
    let copy = |repository: &str, keep: &str| {
        let base = with("", "");
        read(&format!("{base}[[policy.copy-to]]\nrepository = {repository:?}\n[policy.copy-to.retention]\n{keep}\n"))
    };
    assert!(copy("offsite", "keep-last = 1").is_ok());
    let says = |result: Result<_, Vec<String>>, what: &str| {
        let problems: Vec<String> = result.expect_err(what);
        assert!(problems.len() == 1 && problems[0].contains(what), "{problems:#?}");
    };
    says(copy("main", "keep-last = 1"), "writes to \"main\" already");
    says(copy("ofsite", "keep-last = 1"), "did you mean offsite?");
    says(copy("offsite", ""), "keeps nothing");
    says(copy("", "keep-last = 1"), "no repository is named");
}

#[test]
fn what_is_no_policy_file_is_said() {
    for (text, says) in [
        ("", "p.toml:1:1: the file has no policy; begin each policy with [[policy]]"),
        ("[policy]\nname = \"x\"", "p.toml:1:1: policy is a table; write [[policy]] on a line of its own"),
        ("[[policies]]\n", "p.toml:1:3: unknown field \"policies\"; did you mean policy?"),
        ("[[policy]]\nname = \n", "p.toml:2:"),
        ("[[policy]]\nname = \"a\"\nname = \"b\"\n", "p.toml:3:1: duplicate key"),
        ("policy = [1]", "p.toml:1:11: policy[0] is a number"),
    ] {
        let problems = read(text).unwrap_err();
        assert_eq!(problems.len(), 1, "{text}: {problems:#?}");
        assert!(problems[0].starts_with(says), "{text}: {problems:#?}");
    }
    let many = format!("cron = [{}]", vec!["\"@daily\""; 33].join(", "));
    assert!(read(&with("schedule", &many)).unwrap_err()[0].contains("33 cron expressions are too many"));
    // Mistakes of syntax on several lines are all named.
    assert_eq!(read("[[policy]]\nname = \nrepository = \n").unwrap_err().len(), 2);
}

fn policies() -> impl Strategy<Value = Policy> {
    let rule = prop::sample::select(vec!["name:web-*", "tag:a b", "metadata:k=\"v\"", "host:kvm?", "name:ü"]);
    let rules = || prop::collection::vec(rule.clone().prop_map(|rule| rule.parse().unwrap()), 0..3);
    let select = (rules(), rules(), rules()).prop_map(|(any, all, exclude)| Select { any, all, exclude });
    let seconds = || prop::option::of((1_u64..100_000).prop_map(Seconds));
    let window =
        (0_u16..24, 0_u16..24, prop::sample::subsequence(Weekday::ALL.to_vec(), 0..4)).prop_map(|(a, b, days)| {
            let time = |hour: u16| format!("{hour}:07").parse().unwrap();
            Window { start: time(a), end: time(b), days }
        });
    let schedule =
        (prop::option::of(window), any::<bool>(), seconds(), 0_u64..9000).prop_map(|(window, up, late, jitter)| {
            Schedule {
                cron: vec!["@daily".into(), "\"".into()],
                time_zone: "UTC".into(),
                window,
                catch_up: up,
                max_lateness: late,
                jitter: Seconds(jitter),
            }
        });
    let retention = || {
        (0_u32..3, 0_u32..3, prop::option::of(0_u16..40)).prop_map(|(last, yearly, days)| Retention {
            last,
            yearly,
            within: days.map(virtward_model::Age::days),
            tags: if last == 1 { vec!["x".into()] } else { Vec::new() },
            ..Retention::default()
        })
    };
    let copies = prop::collection::vec(
        retention().prop_map(|retention| CopyTo { repository: "offsite".into(), retention }),
        0..3,
    );
    let hooks = (prop::option::of("[a-z\"'\n\\\\]{0,9}"), seconds()).prop_map(|(pre_freeze, timeout)| Hooks {
        pre_freeze,
        post_thaw: None,
        timeout,
    });
    let rest = (prop::option::of(0_u64..5000), seconds(), 0_u32..4, any::<bool>(), -100_i8..=100);
    (select, schedule, retention(), copies, hooks, rest).prop_map(
        |(select, schedule, retention, copy_to, hooks, (bandwidth, rpo, count, warm, priority))| Policy {
            name: "gold".into(),
            paused: warm,
            priority,
            repository: "main".into(),
            mode: if warm { Mode::Warm } else { Mode::Auto },
            quiesce: if warm { QuiesceRequest::Off } else { QuiesceRequest::Auto },
            bandwidth: bandwidth.map(|k| Bytes(k * 512)),
            proxy: if count == 1 { vec!["kvm1".into(), "backup1".into()] } else { Vec::new() },
            timeout: rpo,
            rpo,
            select,
            schedule,
            retention,
            hooks,
            retries: Retries { count, ..Retries::default() },
            copy_to,
        },
    )
}

proptest! {
    /// The three ways to read a policy agree: the file, TOML by its derived form, and JSON.
    #[test]
    fn what_is_written_reads_back(policy in policies()) {
        let text = render(std::slice::from_ref(&policy)).unwrap();
        let (table, errors) = DeTable::parse_recoverable(&text);
        prop_assert!(errors.is_empty(), "{text}");
        let mut notes = Notes::default();
        let read = Table::read(table.get_ref(), String::new(), &mut notes, |t| t.tables("policy", super::policy));
        prop_assert!(notes.problems.is_empty(), "{:?}\n{}", notes.problems, text);
        prop_assert_eq!(read.unwrap(), vec![policy.clone()]);
        let json = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    }

    #[test]
    fn no_text_makes_it_fall_over(text in "(\\[\\[policy\\]\\]\n)?([a-z-]{1,9} ?= ?[\\[\\]{}\"a-z0-9:.,ü ]{0,20}\n){0,5}") {
        let _ = read(&text);
    }
}

//! What the exporters of Prometheus say of a host's hardware: node_exporter (hwmon, EDAC, md, and what scripts put into its
//! textfile directory: smartmon, IPMI), smartctl_exporter and ipmi_exporter.
//!
//! Names and meanings are those that the exporters document. A metric that is not known here says nothing.

use std::collections::BTreeMap;

use super::{Level, Trouble};

/// Lines of a page that are looked at.
const LINES_MAX: usize = 100_000;
/// Correctable memory errors from one look to the next that are worth a word: a bit flips now and then everywhere.
const CORRECTABLE_MAX: f64 = 100.0;

/// Counters of memory errors at the look before, by metric and labels.
pub type Counters = BTreeMap<String, f64>;

/// Of a line: name, labels in their order, value.
type Sample<'a> = (&'a str, Vec<(&'a str, String)>, f64);

/// None for comments and what is no line of metrics.
fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let end = line.find(|letter: char| letter == '{' || letter.is_whitespace())?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(after) = rest.strip_prefix('{') {
        rest = after;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = rest.split_once("=\"")?;
            let (mut value, mut end) = (String::new(), None);
            let mut letters = after.char_indices();
            while let Some((at, letter)) = letters.next() {
                match letter {
                    '"' => {
                        end = Some(at + 1);
                        break;
                    }
                    '\\' => match letters.next()?.1 {
                        'n' => value.push('\n'),
                        other => value.push(other),
                    },
                    other => value.push(other),
                }
            }
            rest = &after[end?..];
            labels.push((key.trim(), value));
        }
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((name, labels, value))
}

/// The troubles that a page of metrics tells of. `before` has the counters of the look before and gets those of this one; at
/// the first look a counter says nothing, since it counts from the start of the host.
pub fn troubles(page: &str, before: &mut Counters) -> Vec<Trouble> {
    let mut found = Vec::new();
    let mut temperatures: BTreeMap<String, [Option<f64>; 3]> = BTreeMap::new();
    let mut counters = Counters::new();
    for (name, labels, value) in page.lines().take(LINES_MAX).filter_map(sample) {
        let label = |key: &str| labels.iter().find(|(name, _)| *name == key).map_or("", |(_, value)| value.as_str());
        let mut tell = |level, text: String| found.push(Trouble::new(level, &text));
        match name {
            "node_hwmon_temp_celsius" | "node_hwmon_temp_max_celsius" | "node_hwmon_temp_crit_celsius" => {
                let sensor = temperatures.entry(format!("{} {}", label("chip"), label("sensor"))).or_default();
                let which = ["node_hwmon_temp_celsius", "node_hwmon_temp_max_celsius", "node_hwmon_temp_crit_celsius"];
                if let Some(at) = which.iter().position(|of| *of == name) {
                    sensor[at] = Some(value);
                }
            }
            // Raised by the chip itself. The exporter gives the first one a unit that it does not have.
            "node_hwmon_temp_crit_alarm_celsius" if value >= 1.0 => {
                tell(Level::Critical, format!("{} {}: critical temperature", label("chip"), label("sensor")));
            }
            "node_hwmon_temp_alarm" | "node_hwmon_fan_alarm" | "node_hwmon_fan_fault" | "node_hwmon_power_alarm"
                if value >= 1.0 =>
            {
                tell(Level::Warning, format!("{} {}: alarm", label("chip"), label("sensor")));
            }
            "node_edac_uncorrectable_errors_total" | "node_edac_correctable_errors_total" => {
                let key = format!("{name} {} {}", label("controller"), label("csrow"));
                let new = before.get(&key).map_or(0.0, |before| value - before);
                counters.insert(key, value);
                let memory = format!("memory controller {}", label("controller"));
                if name == "node_edac_uncorrectable_errors_total" && new > 0.0 {
                    tell(Level::Critical, format!("{memory}: {new:.0} errors that could not be corrected"));
                } else if new > CORRECTABLE_MAX {
                    tell(Level::Warning, format!("{memory}: {new:.0} errors were corrected since the last look"));
                }
            }
            // Both have 1 for a disk that passes its own test.
            "smartmon_device_smart_healthy" | "smartctl_device_smart_status" if value == 0.0 => {
                let disk = if label("disk").is_empty() { label("device") } else { label("disk") };
                tell(Level::Critical, format!("disk {disk}: SMART says that it fails"));
            }
            "smartctl_device_critical_warning" if value != 0.0 => {
                tell(Level::Critical, format!("disk {}: NVMe critical warning {value:.0}", label("device")));
            }
            "node_md_disks" if label("state") == "failed" && value > 0.0 => {
                tell(Level::Warning, format!("RAID {}: {value:.0} disks failed", label("device")));
            }
            // ipmi_exporter: 0 nominal, 1 warning, 2 critical.
            "ipmi_sensor_state"
            | "ipmi_temperature_state"
            | "ipmi_fan_speed_state"
            | "ipmi_voltage_state"
            | "ipmi_power_state"
            | "ipmi_current_state"
                if value >= 1.0 =>
            {
                let level = if value >= 2.0 { Level::Critical } else { Level::Warning };
                tell(level, format!("{}: {}", label("name"), if value >= 2.0 { "critical" } else { "warning" }));
            }
            _ => {}
        }
    }
    for (sensor, [now, high, critical]) in temperatures {
        let Some(now) = now else { continue };
        // Chips without a limit say 0 or something absurd.
        let over = |limit: Option<f64>| limit.filter(|limit| (20.0..200.0).contains(limit) && now >= *limit);
        if let Some(limit) = over(critical) {
            found.push(Trouble::new(Level::Critical, &format!("{sensor}: {now:.0} °C, {limit:.0} are critical")));
        } else if let Some(limit) = over(high) {
            found.push(Trouble::new(Level::Warning, &format!("{sensor}: {now:.0} °C, {limit:.0} are too many")));
        }
    }
    *before = counters;
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(page: &str) -> Vec<String> {
        let all = super::super::sorted(troubles(page, &mut Counters::new()));
        all.into_iter().map(|trouble| format!("{:?} {}", trouble.level, trouble.text)).collect()
    }

    #[test]
    fn a_well_host_has_nothing_to_tell() {
        let page = "# HELP node_hwmon_temp_celsius Hardware monitor for temperature\n\
                    # TYPE node_hwmon_temp_celsius gauge\n\
                    node_hwmon_temp_celsius{chip=\"platform_coretemp_0\",sensor=\"temp1\"} 51\n\
                    node_hwmon_temp_max_celsius{chip=\"platform_coretemp_0\",sensor=\"temp1\"} 84\n\
                    node_hwmon_temp_crit_celsius{chip=\"platform_coretemp_0\",sensor=\"temp1\"} 100\n\
                    node_hwmon_temp_celsius{chip=\"no_limit\",sensor=\"temp1\"} 60\n\
                    node_hwmon_temp_crit_celsius{chip=\"no_limit\",sensor=\"temp1\"} 0\n\
                    smartmon_device_smart_healthy{disk=\"/dev/sda\",type=\"sat\"} 1\n\
                    node_edac_uncorrectable_errors_total{controller=\"0\"} 4\n\
                    node_md_disks{device=\"md0\",state=\"failed\"} 0\n\
                    ipmi_fan_speed_state{id=\"1\",name=\"FAN1\"} 0\nup 1\n\n";
        assert_eq!(told(page), Vec::<String>::new());
    }

    #[test]
    fn what_is_wrong_is_told_the_worst_first() {
        let page = "node_hwmon_temp_celsius{chip=\"cpu\",sensor=\"temp1\"} 101.5\n\
                    node_hwmon_temp_crit_celsius{chip=\"cpu\",sensor=\"temp1\"} 1e+02\n\
                    node_hwmon_temp_celsius{chip=\"board\",sensor=\"temp2\"} 71\n\
                    node_hwmon_temp_max_celsius{chip=\"board\",sensor=\"temp2\"} 70\n\
                    smartmon_device_smart_healthy{disk=\"/dev/sda\",type=\"sat\"} 0\n\
                    smartctl_device_smart_status{device=\"nvme0\"} 0\n\
                    node_md_disks{device=\"md0\",state=\"failed\"} 1\n\
                    ipmi_power_state{id=\"7\",name=\"PSU 2, \\\"right\\\"\"} 2\n";
        assert_eq!(
            told(page),
            [
                "Critical PSU 2, \"right\": critical",
                "Critical cpu temp1: 102 °C, 100 are critical",
                "Critical disk /dev/sda: SMART says that it fails",
                "Critical disk nvme0: SMART says that it fails",
                "Warning RAID md0: 1 disks failed",
                "Warning board temp2: 71 °C, 70 are too many",
            ]
        );
    }

    #[test]
    fn counters_tell_what_is_new() {
        let page = |bad: u32, corrected: u32| {
            format!(
                "node_edac_uncorrectable_errors_total{{controller=\"0\"}} {bad}\n\
                 node_edac_correctable_errors_total{{controller=\"0\"}} {corrected}\n"
            )
        };
        let mut counters = Counters::new();
        assert_eq!(troubles(&page(3, 5000), &mut counters), []);
        assert_eq!(troubles(&page(3, 5050), &mut counters), []);
        let told = troubles(&page(4, 6000), &mut counters);
        assert_eq!(told.iter().map(|trouble| trouble.level).collect::<Vec<_>>(), [Level::Critical, Level::Warning]);
        // The host was started anew.
        assert_eq!(troubles(&page(0, 0), &mut counters), []);
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        for line in
            ["{", "a{b", "a{b=", "a{b=\"", "a{b=\"c\\", "a{b=\"c\"", "a{b=\"c\"}", "a{} x", "a", "ä{ö=\"ü\"} 1 2 3"]
        {
            assert_eq!(told(line), Vec::<String>::new(), "{line}");
        }
    }
}

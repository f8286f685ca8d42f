//! What a VM will want in the next hours, from what it wanted at the same time in weeks before.

use serde::{Deserialize, Serialize};

/// Hours in a week.
pub const HOURS: usize = 168;
/// A week counts for this part against all weeks before it.
const NEW: f64 = 0.3;

/// The demand of one VM for one resource, by hour of the week.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weekly {
    /// By hour of the week, counted from any hour that stays the same: mean of the highest demands of that hour;
    /// `None`: not seen.
    peaks: Vec<Option<f64>>,
    /// The hour that is being seen and its highest demand so far.
    now: Option<(usize, u64)>,
}

impl Default for Weekly {
    fn default() -> Self {
        Self { peaks: vec![None; HOURS], now: None }
    }
}

impl Weekly {
    /// Sees a demand in an hour of the week (of any week; wraps).
    pub fn observe(&mut self, hour: usize, demand: u64) {
        let hour = hour % HOURS;
        match &mut self.now {
            Some((seen, peak)) if *seen == hour => *peak = (*peak).max(demand),
            now => {
                let done = now.replace((hour, demand));
                if let Some((seen, peak)) = done {
                    let known = &mut self.peaks[seen];
                    *known = Some(known.map_or(peak as f64, |known| known + NEW * (peak as f64 - known)));
                }
            }
        }
    }

    /// The highest demand that is expected in this hour and the `ahead` next ones; `None`: nothing is known of them.
    pub fn expect(&self, hour: usize, ahead: usize) -> Option<u64> {
        let hours = (hour..=hour + ahead.min(HOURS)).filter_map(|hour| self.peaks[hour % HOURS]);
        hours
            .fold(None, |most: Option<f64>, peak| Some(most.map_or(peak, |most| most.max(peak))))
            .map(|peak| peak as u64)
    }

    /// What to plan with: what is wanted now or, if that is more, soon; never above `size`, which is all that it can use.
    pub fn demand(&self, now: u64, hour: usize, ahead: usize, size: u64) -> u64 {
        now.max(self.expect(hour, ahead).unwrap_or(0).min(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monday_at_nine_is_known_at_eight_from_last_week() {
        let mut weekly = Weekly::default();
        for hour in 0..2 * HOURS {
            weekly.observe(hour, if hour % HOURS == 9 { 4000 } else { 100 });
        }
        assert_eq!(weekly.expect(8, 0), Some(100));
        assert_eq!(weekly.demand(100, 2 * HOURS + 8, 1, 8000), 4000);
        assert_eq!(weekly.demand(100, 8, 1, 2000), 2000);
        assert_eq!(weekly.demand(5000, 8, 1, 8000), 5000);
        assert_eq!(Weekly::default().expect(9, 3), None);
    }

    #[test]
    fn a_pattern_that_ended_is_forgotten_in_weeks() {
        let mut weekly = Weekly::default();
        for week in 0..10 {
            for hour in 0..HOURS {
                weekly.observe(hour, if hour == 9 && week < 2 { 4000 } else { 100 });
            }
        }
        assert!(weekly.expect(9, 0).unwrap() < 500);
    }
}

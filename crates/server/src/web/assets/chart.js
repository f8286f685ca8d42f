// Drawings: growth of a repository, restore points on a line of time. Each says in words what it shows.

import { h, s } from './dom.js';
import { absolute, bytes, day } from './format.js';
import { t } from './i18n.js';

const DAY = 86400000;

const ROUND = [1, 2, 3, 4, 5, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 250, 300, 400, 500, 750, 1024];

/** A number above `value` whose quarters are round in their unit. */
function roof(value) {
  let unit = 1;
  while (value / 4 > unit * 1024) unit *= 1024;
  return 4 * unit * ROUND.find((step) => step * unit >= value / 4);
}

/** Bytes over time, from zero; the scale is at the end, which is now. */
export function growth(samples) {
  const [width, height, left, right, bottom, top] = [720, 210, 10, 66, 24, 12];
  const times = samples.map((sample) => new Date(sample.at).getTime());
  const [first, last] = [times[0], times[times.length - 1]];
  const max = roof(Math.max(...samples.map((sample) => sample.bytes)));
  const x = (time) => left + ((width - left - right) * (time - first)) / Math.max(1, last - first);
  const y = (value) => height - bottom - ((height - bottom - top) * value) / max;
  const dots = samples.map((sample, at) => `${x(times[at]).toFixed(1)},${y(sample.bytes).toFixed(1)}`);
  const end = samples[samples.length - 1];
  const label = t('repository.growth-label', { from: absolute(first), to: absolute(last), start: bytes(samples[0].bytes), end: bytes(end.bytes) });
  const marks = [0, 0.25, 0.5, 0.75, 1].map((part) => max * part);
  const dates = [0, 0.25, 0.5, 0.75, 1].map((part) => first + (last - first) * part);
  return h('div', { class: 'chart-box' }, s('svg', { class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label },
    marks.map((value) => [
      s('line', { class: 'grid-line', x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      s('text', { x: width - right + 8, y: y(value) + 4 }, bytes(value))]),
    dates.map((time, at) => s('text', { x: x(time), y: height - 6, 'text-anchor': at === 0 ? 'start' : at === 4 ? 'end' : 'middle' }, day(time))),
    s('path', { class: 'area', d: `M${x(first)},${y(0)} L${dots.join(' ')} L${x(last)},${y(0)} Z` }),
    s('polyline', { class: 'curve', points: dots.join(' ') }),
    s('circle', { class: 'last', cx: x(last), cy: y(end.bytes), r: 4 })));
}

/** Restore points over the last days, each a link. */
export function timeline(points, days, href) {
  const [width, height] = [960, 84];
  const [now, from] = [Date.now(), Date.now() - days * DAY];
  const shown = points.filter((point) => new Date(point.taken) >= from);
  const time = (point) => new Date(point.taken).getTime();
  const x = (at) => 16 + ((width - 32) * (at - from)) / (now - from);
  const step = days <= 8 ? 1 : days <= 40 ? 5 : 15;
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  const ticks = [];
  for (let at = midnight; at >= from; at -= step * DAY) ticks.push(at);
  return h('div', { class: 'chart-box', key: 'timeline' },
    s('svg', { class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'group', 'aria-label': t('vm.timeline-label', { n: shown.length, days }) },
      ticks.map((at) => [
        s('line', { class: 'lane', x1: x(at), x2: x(at), y1: 8, y2: 58 }),
        s('text', { x: Math.min(Math.max(x(at), 22), width - 30), y: 76, 'text-anchor': 'middle' }, day(at))]),
      s('line', { class: 'axis', x1: 16, x2: width - 16, y1: 36, y2: 36 }),
      s('line', { class: 'now', x1: width - 16, x2: width - 16, y1: 8, y2: 58 }),
      [...shown].reverse().map((point) => s('a', { href: href(point), 'aria-label': t('vm.point-label', { at: absolute(point.taken), kind: t(`point.${point.kind}`) }) },
        s('title', null, `${absolute(point.taken)} · ${t(`point.${point.kind}`)} · +${bytes(point.stored_bytes)}`),
        s('rect', { class: 'hit', x: x(time(point)) - 6, y: 8, width: 12, height: 50 }),
        s('rect', { class: `point ${point.kind}`, x: (x(time(point)) - 2).toFixed(1), y: point.kind === 'full' ? 18 : 26, width: 4, height: point.kind === 'full' ? 36 : 20, rx: 2 })))));
}

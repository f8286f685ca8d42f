// Numbers, sizes and times as people read them, in their language and zone.

import { h } from './dom.js';
import { language, t, word } from './i18n.js';

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
const NONE = '–';

/** English is written in several ways; the browser says in which. */
const locale = () => (language() === 'en' && navigator.language.startsWith('en') ? navigator.language : language());

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  let [size, unit] = [value, 0];
  while (size >= 1024 && unit < UNITS.length - 1) [size, unit] = [size / 1024, unit + 1];
  const digits = unit === 0 || size >= 100 ? 0 : 1;
  return `${number(size, digits)}\u00a0${UNITS[unit]}`;
}

export const rate = (value) => `${bytes(value)}/s`;

export function number(value, digits = 0) {
  if (value === null || value === undefined) return NONE;
  return new Intl.NumberFormat(locale(), { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

export const percent = (part, whole) => (whole > 0 ? Math.min(100, Math.max(0, (100 * part) / whole)) : 0);

export const ratio = (value) => (value === null || value === undefined ? NONE : `${number(value, value >= 10 ? 1 : 2)}\u00d7`);

/** A length of time: two units at most. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 1) return t('duration.moment');
  const whole = Math.round(seconds);
  const parts = [['d', Math.floor(whole / 86400)], ['h', Math.floor(whole / 3600) % 24], ['m', Math.floor(whole / 60) % 60], ['s', whole % 60]];
  const first = parts.findIndex(([, count]) => count > 0);
  const shown = parts.slice(first, first + 2).filter(([, count]) => count > 0);
  return shown.map(([unit, n]) => t(`duration.${unit}`, { n })).join(' ');
}

const between = (from, to) => (new Date(to) - new Date(from)) / 1000;

/** How long something ran, or runs. */
export const elapsed = (from, to) => (from ? duration(Math.max(0, between(from, to ?? Date.now()))) : NONE);

/** Chinese writes both clocks; of these the one with 24 hours is the shorter. */
const hours = () => (language() === 'zh-TW' ? { hourCycle: 'h23' } : {});

export function absolute(at) {
  return new Intl.DateTimeFormat(locale(), { dateStyle: 'medium', timeStyle: 'long', ...hours() }).format(new Date(at));
}

export const short = (at) => new Intl.DateTimeFormat(locale(), { dateStyle: 'medium', timeStyle: 'short', ...hours() }).format(new Date(at));
/** The time of day, to the second. */
export const second = (at) => new Date(at).toLocaleTimeString(locale(), { hour12: false });
export const day = (at) => new Intl.DateTimeFormat(locale(), { month: 'short', day: 'numeric' }).format(new Date(at));

const STEPS = [[60, 'second', 1], [3600, 'minute', 60], [86400, 'hour', 3600], [86400 * 60, 'day', 86400], [Infinity, 'month', 86400 * 30]];

function relative(at) {
  const distance = (new Date(at) - Date.now()) / 1000;
  const [, unit, size] = STEPS.find(([limit]) => Math.abs(distance) < limit);
  if (unit === 'second') return distance <= 0 ? t('time.now') : t('time.soon');
  const style = language() === 'en' ? 'narrow' : 'short';
  return new Intl.RelativeTimeFormat(locale(), { numeric: 'always', style }).format(Math.round(distance / size), unit);
}

/** How far away a time is, with the time itself on hover and for screen readers. */
export function when(at) {
  if (!at) return NONE;
  return h('time', { datetime: at, title: absolute(at), 'data-relative': true }, relative(at));
}

/** A time as such. */
export const clock = (at) => (at ? h('time', { datetime: at, title: absolute(at) }, short(at)) : NONE);

/** Lets what says how far away a time is go on being true. */
export function keepTime() {
  setInterval(() => {
    for (const element of document.querySelectorAll('time[data-relative]')) {
      const text = relative(element.dateTime);
      if (element.textContent !== text) element.firstChild.data = text;
    }
  }, 10000);
}

// What values of these names are called.
const CALLED = { kind: 'kind', operation: 'operation', state: 'power' };

function put(name, value) {
  if (value?.key) return said(value, value.key);
  if (Array.isArray(value)) return new Intl.ListFormat(locale()).format(value.map(String));
  if (name === 'subject' && value === null) return t('balance.all-hosts');
  if (name.endsWith('_at')) return short(value);
  if (name.endsWith('_s')) return duration(value);
  if (name.endsWith('_bytes')) return bytes(value);
  return name in CALLED ? word(`${CALLED[name]}.${value}`, value) : value;
}

/** A sentence of the daemon in the reader's language; as the daemon wrote it where this page does not know it. */
export function said(one, written) {
  if (!one || word(`said.${one.key}`, null) === null) return written;
  const { code, why, ...values } = one.values ?? {};
  const text = t(`said.${one.key}`, Object.fromEntries(Object.entries(values).map(([name, value]) => [name, put(name, value)])));
  if (!why) return text;
  return code ? t('sentence.because', { said: text, problem: word(`problem.${code}`, code), why }) : t('sentence.why', { said: text, why });
}

/** Why a job failed: of which kind it is in the reader's language, and what exactly as the daemon wrote it. */
export const failure = (error) => (error.code ? t('sentence.failure', { problem: word(`problem.${error.code}`, error.code), why: error.message }) : error.message);

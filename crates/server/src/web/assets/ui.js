// What pages are made of: chips, tables, progress, dialogs, messages.

import { h, patch } from './dom.js';
import { bytes, duration, percent, rate, said } from './format.js';
import { icon } from './icons.js';
import { t, word } from './i18n.js';

const TONES = {
  protection: { protected: 'good', overdue: 'bad', pending: 'info', unprotected: 'warn', unknown: 'mute' },
  job: { queued: 'info', running: 'info', succeeded: 'good', failed: 'bad', cancelled: 'mute', interrupted: 'warn' },
  power: { running: 'good', paused: 'warn', 'shut-off': 'mute', crashed: 'bad', other: 'mute' },
  host: { up: 'good', 'libvirtd-down': 'warn', down: 'bad', unknown: 'mute' },
  'ha-phase': { armed: 'good', suspect: 'warn', fencing: 'bad', fenced: 'bad', out: 'mute' },
  'ha-grade': { full: 'good', degraded: 'warn', none: 'bad' },
  'ha-vm': { running: 'good', claimed: 'info', starting: 'info', stopped: 'mute', lost: 'bad', claimable: 'bad' },
  repository: { ok: 'good', unusable: 'bad', unknown: 'mute' },
  severity: { info: 'info', warning: 'warn', error: 'bad' },
};

export const tone = (kind, state) => TONES[kind][state] ?? 'mute';

/** A state in a word and a colour. */
export function chip(kind, state, title) {
  const busy = kind === 'job' && state === 'running' ? ' busy' : '';
  // What a machine does is a fact, not a worry: no colour behind it.
  const plain = kind === 'power' && state !== 'crashed' ? ' plain' : '';
  return h('span', { class: `chip ${tone(kind, state)}${busy}${plain}`, title, 'data-state': state }, t(`${kind}.${state}`));
}

export const tag = (text) => h('span', { class: 'tag' }, text);

/** A block with a heading. */
export function card(title, { end, wide = '', key } = {}, ...children) {
  return h('section', { class: `card ${wide}`, key: key ?? title }, title && h('header', null, h('h2', null, title), end && h('div', { class: 'end' }, end)), children);
}

export const body = (...children) => h('div', { class: 'body stack' }, children);

/** The head of a page: title, what it belongs to, what can be done. */
export function head(title, { crumb, lead, beside, actions } = {}) {
  return h('header', { class: 'head', key: 'head' },
    crumb && h('nav', { class: 'crumb', 'aria-label': t('nav.above') }, crumb),
    h('h1', null, title), beside,
    actions && h('div', { class: 'actions' }, actions),
    lead && h('p', { class: 'lead' }, lead));
}

export function button(text, onclick, { kind = '', sign, disabled, type = 'button', label } = {}) {
  return h('button', { type, class: `button ${kind}`, onclick, disabled, 'aria-label': label }, sign && icon(sign), text);
}

/** A link that looks like a button. */
export const door = (text, href, { kind = '', sign } = {}) => h('a', { href, class: `button ${kind}` }, sign && icon(sign), text);

export function field(label, input, help) {
  return h('label', { class: 'field' }, h('span', null, label), input, help && h('small', null, help));
}

export function check(label, checked, onchange, help, type = 'checkbox', name) {
  return h('label', { class: 'check' }, h('input', { type, name, checked, onchange }), h('span', null, label, help && h('small', null, help)));
}

export function select(value, options, onchange, label) {
  return h('select', { value, onchange: (event) => onchange(event.target.value), 'aria-label': label },
    options.map(([name, text]) => h('option', { value: name }, text)));
}

/** Choices of which one holds at a time; the same again takes it back. */
export function choices(label, value, options, choose) {
  return h('div', { class: 'choices', role: 'group', 'aria-label': label }, options.map(([name, text, count]) =>
    h('button', { type: 'button', class: 'choice', 'aria-pressed': String(value === name), onclick: () => choose(value === name ? '' : name) },
      text, count !== undefined && h('b', null, String(count)))));
}

/**
 * A table. Columns are `{ label, cell, num, sort, blank, minor }`, `minor` ones only where there is room, `wide` ones not on a phone; the first is what a row is called. `sorting` is
 * `{ by, choose }`.
 */
export function table(columns, rows, { label, id, sorting, more } = {}) {
  const heading = (column) => {
    if (!column.sort || !sorting) return column.blank ? h('span', { class: 'visually-hidden' }, column.label) : column.label;
    const on = sorting.by === column.sort ? 'up' : sorting.by === `-${column.sort}` ? 'down' : undefined;
    return h('button', { type: 'button', class: 'sort', 'data-on': on, onclick: () => sorting.choose(on === 'up' ? `-${column.sort}` : column.sort) }, column.label);
  };
  const order = (column) => {
    if (!column.sort || !sorting) return undefined;
    return sorting.by === column.sort ? 'ascending' : sorting.by === `-${column.sort}` ? 'descending' : 'none';
  };
  const kind = (column, at) => [column.num && 'num', at === 0 && 'first', column.blank && 'act', column.minor && 'minor', column.wide && 'wide'].filter(Boolean).join(' ') || undefined;
  return h('div', { class: 'table-box' },
    h('table', { class: 'folds', 'aria-label': label },
      h('thead', null, h('tr', null, columns.map((column) => h('th', { scope: 'col', class: kind(column, -1), 'aria-sort': order(column) }, heading(column))))),
      h('tbody', null, rows.map((row) => h('tr', { key: id?.(row), 'data-id': id?.(row) },
        columns.map((column, at) => h('td', { class: kind(column, at), 'data-label': column.label }, h('div', null, column.cell(row)))))))),
    more && h('div', { class: 'empty' }, button(t('list.more'), more)));
}

export function empty(text, ...beside) {
  return h('div', { class: 'empty' }, h('p', null, text), beside.length > 0 && h('div', { class: 'row' }, beside));
}

export const waiting = () => h('div', { class: 'card', 'aria-busy': 'true', key: 'waiting' }, h('span', { class: 'visually-hidden' }, t('list.loading')), [92, 70, 84, 60].map((width) => h('div', { class: 'ghost', style: { width: `${width}%` } })));

export function note(kind, ...lines) {
  const signs = { good: 'good', info: 'info' };
  return h('div', { class: `note ${kind}` }, icon(signs[kind] ?? 'alert'), h('div', null, lines.filter(Boolean).map((line) => h('p', null, line))));
}

/** What is wrong, in the words of the daemon, under a heading in those of the page. */
export function trouble(problem) {
  return h('div', { role: 'alert', key: 'trouble' }, note('bad', h('b', null, word(`problem.${problem.code}`, t('problem.internal'))), problem.message !== problem.code && problem.message, problem.hint,
    problem.errors?.map((error) => h('div', null, error.field, ': ', error.message))));
}

export function facts(...pairs) {
  return h('dl', { class: 'facts' }, pairs.filter(Boolean).map(([name, value]) => [h('dt', null, name), h('dd', null, value)]));
}

/** How full something is. */
export function gauge(part, whole, label) {
  const full = percent(part, whole);
  const kind = full >= 92 ? 'bad' : full >= 80 ? 'warn' : '';
  return h('div', { class: 'bar', role: 'meter', 'aria-label': label, 'aria-valuemin': '0', 'aria-valuemax': '100', 'aria-valuenow': String(Math.round(full)) },
    h('i', { class: kind, style: { width: `${full}%` } }));
}

/** How far a job is. */
export function progress(job) {
  if (job.state === 'queued') return h('small', { class: 'soft' }, said(job.waiting_said, job.waiting_for ?? t('job.queued')));
  const { phase, detail, done_bytes: done, total_bytes: total, rate_bytes_s: speed, remaining_s: left } = job.progress;
  // Jobs that have others do the work count what these move, not bytes.
  const isPlan = job.kind === 'drain' || job.kind === 'balance';
  const full = percent(done, total);
  const name = job.is_cancelling ? t('jobs.cancelling') : word(`phase.${phase}`, phase ?? t('phase.preparing'));
  return h('div', { class: 'progress' },
    h('div', { class: 'bar moving', role: 'progressbar', 'aria-label': t('jobs.progress'), 'aria-valuemin': '0', 'aria-valuemax': '100', 'aria-valuenow': String(Math.round(full)), 'aria-valuetext': `${name} ${Math.round(full)} %` },
      h('i', { style: { width: `${full}%` } })),
    h('div', { class: 'row' }, h('span', null, name), detail && h('span', null, detail), !isPlan && total > 0 && h('span', null, t('jobs.amount', { done: bytes(done), total: bytes(total) })), !isPlan && speed > 0 && h('span', null, rate(speed)), !isPlan && left !== null && left !== undefined && h('span', null, t('jobs.left', { time: duration(left) }))));
}

/** What a job is about. */
export const subject = (job) => job.vm?.name ?? (job.kind === 'balance' ? t('balance.all-hosts') : job.repository || job.host);

/** Asks before something that cannot be taken back, or for what is needed. Gives what `done` was called with, or null. */
export function dialog(title, build) {
  return new Promise((resolve) => {
    const box = h('dialog', { 'aria-labelledby': 'dialog-title' });
    const finish = (value) => {
      resolve(value);
      box.close();
    };
    const draw = () => patch(box, [h('div', { class: 'inner' }, h('h2', { id: 'dialog-title' }, title), build(finish, draw))]);
    box.onclose = () => {
      resolve(null);
      box.remove();
    };
    draw();
    document.body.append(box);
    box.showModal();
  });
}

export function confirm(title, text, action) {
  return dialog(title, (finish) => [h('p', null, text), ends(button(t('action.keep'), () => finish(null)), button(action, () => finish(true), { kind: 'primary danger' }))]);
}

export const ends = (...children) => h('div', { class: 'dialog-end' }, children);

/** A short message that goes by itself; errors stay until they are closed. */
export function toast(kind, ...lines) {
  const place = document.querySelector('.toasts');
  const shown = h('div', { class: `note ${kind}` }, icon(kind === 'good' ? 'good' : 'alert'), h('div', null, lines.filter(Boolean).map((line) => h('p', null, line))),
    h('button', { type: 'button', class: 'link', 'aria-label': t('action.close'), onclick: () => shown.remove() }, '\u00d7'));
  place.append(shown);
  if (kind === 'good') setTimeout(() => shown.remove(), 10000);
}

/** Does something and says what went wrong. */
export async function attempt(work) {
  try {
    return await work();
  } catch (problem) {
    if (problem.code === undefined) throw problem;
    toast('bad', word(`problem.${problem.code}`, t('problem.internal')), problem.message !== problem.code && problem.message, problem.hint);
    return undefined;
  }
}

/** Does something a little later, once for all that asked for it meanwhile. `stop` takes it back. */
export function soon(work, ms = 1200) {
  let timer = null;
  const wish = () => {
    timer ??= setTimeout(() => {
      timer = null;
      work();
    }, ms);
    return false;
  };
  wish.stop = () => clearTimeout(timer);
  return wish;
}

/** An id, short enough to read: its end, as those of the same minute begin alike. */
export const tail = (id) => h('code', { title: id }, `…${id.slice(-8)}`);
/** The same of a restore point, which is also found by how it begins. */
export const brief = (id) => h('code', { title: id }, id.slice(0, 8));

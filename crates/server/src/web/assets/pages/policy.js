// One policy as text: checked while it is written, compared before it is applied.

import * as api from '../api.js';
import { h } from '../dom.js';
import { absolute, clock, when } from '../format.js';
import { t } from '../i18n.js';
import { attempt, body, button, card, confirm, empty, facts, head, note, table, toast, trouble } from '../ui.js';
import { vmPath } from './shared.js';

const CHECK_AFTER_MS = 400;
const VMS_SHOWN = 30;
const TEMPLATE = `[[policy]]
name = "nightly"
repository = "default"
rpo = "30h"

[policy.select]
any = ["name:*"]
exclude = ["tag:no-backup"]

[policy.schedule]
cron = "0 22 * * *"
time-zone = "ZONE"
jitter = "30m"

[policy.retention]
keep-daily = 14
keep-weekly = 8
`;

export default function policy({ params, who, update, go, load }) {
  // No policy can have this name.
  const isNew = params.policy === '+new';
  const canChange = api.may(who, 'admin');
  let [stored, text, isJson] = [null, '', false];
  let [report, diff, problem, isStale] = [null, null, null, false];
  let [timer, round] = [null, 0];

  const original = () => (stored ? stored.source ?? JSON.stringify(stored.policy, null, 2) : TEMPLATE.replace('ZONE', Intl.DateTimeFormat().resolvedOptions().timeZone));

  /** What is sent; throws if JSON is none. */
  function document_() {
    if (!isJson) return { source: text, file: t('policies.editor') };
    return { policy: JSON.parse(text) };
  }

  async function examine() {
    const mine = ++round;
    let [found, wrong] = [null, null];
    try {
      found = await api.post(['policies', 'validate'], document_());
    } catch (error) {
      wrong = error instanceof SyntaxError ? { code: 'bad-request', message: error.message, errors: [] } : error;
    }
    if (mine !== round) return;
    [report, problem] = [found, wrong];
    update();
  }

  function typed(event) {
    text = event.target.value;
    diff = null;
    clearTimeout(timer);
    timer = setTimeout(examine, CHECK_AFTER_MS);
    update();
  }

  /** Tab indents; Escape, then Tab, leaves: nobody is caught in the field. */
  let isLeaving = false;
  function pressed(event) {
    if (event.key === 'Escape') isLeaving = true;
    else if (event.key === 'Tab' && !event.shiftKey && !isLeaving) {
      event.preventDefault();
      const { selectionStart: from, selectionEnd: to } = event.target;
      event.target.setRangeText('    ', from, to, 'end');
      typed(event);
    } else isLeaving = false;
  }

  function toLine(line) {
    const area = document.getElementById('source');
    const before = text.split('\n').slice(0, line - 1).join('\n').length + (line > 1 ? 1 : 0);
    area.focus();
    area.setSelectionRange(before, before + text.split('\n')[line - 1].length);
  }

  const compare = () => attempt(async () => {
    await examine();
    if (!report?.is_valid) return;
    diff = await api.post(['policies', 'diff'], document_());
    update();
    setTimeout(() => document.getElementById('diff')?.scrollIntoView({ block: 'nearest' }), 30);
  });

  const apply = () => attempt(async () => {
    const { name } = diff;
    const revision = stored && stored.name === name ? stored.revision : diff.is_new ? 0 : undefined;
    stored = await api.put(['policies', name], document_(), revision === undefined ? {} : { 'if-match': String(revision) });
    [diff, isStale] = [null, false];
    toast('good', t('policies.applied', { name }));
    if (params.policy === name) await load();
    else await go(api.path(['policies', name]));
  });

  async function drop() {
    if (!await confirm(t('policies.delete-title', { name: stored.name }), t('policies.delete-text'), t('policies.delete'))) return;
    await attempt(async () => {
      await api.remove(['policies', stored.name]);
      go('/policies');
    });
  }

  function editor() {
    const lines = text.split('\n');
    const marks = new Map();
    for (const finding of report?.findings ?? []) {
      if (finding.line && marks.get(finding.line) !== 'error') marks.set(finding.line, finding.severity);
    }
    const height = `${lines.length * 20 + 34}px`;
    return h('div', { class: 'editor', key: 'editor' },
      h('div', { class: 'lines', 'aria-hidden': 'true' }, lines.map((_, at) => h('span', { class: marks.get(at + 1) }, String(at + 1)))),
      h('textarea', { id: 'source', value: text, oninput: typed, onkeydown: pressed, spellcheck: 'false', autocomplete: 'off', autocapitalize: 'off', wrap: 'off', readonly: !canChange, style: { height }, 'aria-label': t('policies.text'), 'aria-describedby': 'findings' }));
  }

  function findings() {
    if (problem) return trouble(problem);
    if (!report) return h('p', { class: 'soft' }, t('policies.checking'));
    if (report.findings.length === 0) return note('good', t('policies.valid'));
    return h('ul', { class: 'findings' }, report.findings.map((finding) => h('li', null,
      h('span', { class: `chip ${finding.severity === 'error' ? 'bad' : 'warn'}` }, t(`severity.${finding.severity}`)), ' ',
      finding.line && h('button', { type: 'button', class: 'link', onclick: () => toLine(finding.line) }, t('policies.line', { n: finding.line })), ' ',
      h('code', null, finding.field), ' ', finding.message)));
  }

  const names = (vms) => [vms.slice(0, VMS_SHOWN).map((vm, at) => [at > 0 && ', ', h('a', { href: vmPath(vm) }, vm.name)]), vms.length > VMS_SHOWN && [' ', t('policies.more', { n: vms.length - VMS_SHOWN })]];

  function effect() {
    return card(t('policies.effect'), { wide: 'third' }, body(
      h('div', { id: 'findings', role: 'status' }, findings()),
      report && [
        h('div', { key: 'vms' }, h('h3', null, t('policies.selects', { n: report.vms.length })), h('p', null, report.vms.length === 0 ? '–' : names(report.vms))),
        h('div', { key: 'runs' }, h('h3', null, t('policies.runs')), report.next_runs.length === 0 ? h('p', null, '–') : h('ol', null, report.next_runs.map((at) => h('li', { title: absolute(at) }, clock(at), ' ', h('small', { class: 'soft' }, when(at))))))],
      stored && facts([t('policies.revision'), String(stored.revision)], [t('policies.changed'), [when(stored.updated), ` · ${stored.updated_by}`]])));
  }

  const value = (one) => (one === null ? '–' : typeof one === 'string' ? one : JSON.stringify(one));

  function changes() {
    const columns = [
      { label: t('policies.field'), cell: (change) => change.field },
      { label: t('policies.from'), cell: (change) => h('del', null, value(change.from)) },
      { label: t('policies.to'), cell: (change) => h('ins', null, value(change.to)) },
    ];
    const isNothing = !diff.is_new && diff.changes.length === 0;
    return h('div', { id: 'diff', key: 'diff' }, card(t('policies.preview'), {},
      h('div', { class: 'body stack' },
        h('p', { role: 'status' }, diff.is_new ? t('policies.is-new', { name: diff.name }) : isNothing ? t('policies.no-change') : t('policies.will-change', { name: diff.name })),
        diff.vms_added.length > 0 && note('info', h('b', null, t('policies.vms-added', { n: diff.vms_added.length })), h('span', null, names(diff.vms_added))),
        diff.vms_removed.length > 0 && note('warn', h('b', null, t('policies.vms-removed', { n: diff.vms_removed.length })), h('span', null, names(diff.vms_removed)))),
      diff.changes.length > 0 && h('div', { class: 'changes' }, table(columns, diff.changes, { label: t('policies.preview'), id: (change) => change.field })),
      h('div', { class: 'body' }, h('div', { class: 'dialog-end' }, button(t('action.back'), () => {
        diff = null;
        update();
      }), button(t('policies.apply'), apply, { kind: 'primary', sign: 'check' })))));
  }

  return {
    title: () => (isNew ? t('policies.new') : params.policy),
    async load() {
      if (!isNew) stored = await api.get(['policies', params.policy]);
      isJson = stored !== null && stored.source === null;
      [text, isStale] = [original(), false];
      await examine();
    },
    end: () => clearTimeout(timer),
    on: {
      policy({ name, revision }) {
        if (!stored || name !== stored.name || revision === stored.revision) return false;
        isStale = true;
        return true;
      },
    },
    view: () => [
      head(isNew ? t('policies.new') : params.policy, {
        crumb: h('a', { href: '/policies' }, t('nav.policies')),
        beside: stored?.is_paused && h('span', { class: 'chip warn' }, t('policies.paused')),
        actions: canChange && [
          stored && button(t('policies.delete'), drop, { kind: 'danger' }),
          button(t('policies.compare'), compare, { kind: 'primary', disabled: !report?.is_valid || diff !== null })],
      }),
      h('div', { class: 'stack', key: 'all' },
        isStale && note('warn', t('policies.stale'), button(t('policies.reload'), load, { kind: 'small' })),
        diff && changes(),
        h('div', { class: 'grid' },
          card(t('policies.text'), { wide: 'two-thirds', end: isJson ? 'JSON' : 'TOML' }, h('div', { class: 'body' }, h('small', { class: 'soft' }, canChange ? t('policies.editor-help') : t('policies.read-only'))), text === '' && !stored ? empty(t('policies.none')) : editor()),
          effect())),
    ],
  };
}

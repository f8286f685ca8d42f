// What several pages show in the same way.

import { attempt, button, check, chip, confirm, dialog, ends, field, gauge, note, progress, select, subject, table, tail, toast } from '../ui.js';
import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, elapsed, failure, number, said, when } from '../format.js';
import { t } from '../i18n.js';

/** The path of a VM's page. */
export const vmPath = (vm, ...more) => api.path(['vms', vm.uuid ?? vm, ...more]);

export const hostPath = (name) => api.path(['hosts', name]);

/** How full something of a host is, in a cell of a table. */
const meter = (part, whole, label, text) => h('div', { class: 'meter' }, gauge(part, whole, label), h('small', null, text));

export const load = (host) => (host.cpus === null || host.load === null ? '–' : meter(host.load, host.cpus, t('hosts.load'), t('hosts.load-short', { load: number(host.load, 2), cpus: number(host.cpus) })));

export function memory({ memory_bytes: all, memory_available_bytes: free }) {
  return all === null || free === null ? '–' : meter(all - free, all, t('hosts.memory'), t('hosts.free', { free: bytes(free) }));
}

/** The fullest of a host's file systems. */
export function room({ storage }) {
  if (storage.length === 0) return '–';
  const used = (one) => (one.total_bytes - one.free_bytes) / one.total_bytes;
  const fullest = storage.reduce((worst, one) => (used(one) > used(worst) ? one : worst));
  return meter(fullest.total_bytes - fullest.free_bytes, fullest.total_bytes, fullest.path, t('hosts.free', { free: bytes(fullest.free_bytes) }));
}

export const jobLink = (job) => h('a', { class: 'name', href: api.path(['jobs', job.id]) }, t(`kind.${job.kind}`));

export const policyLinks = (names) => names.length === 0 ? '–' : names.map((name, at) => [at > 0 && ', ', h('a', { href: api.path(['policies', name]) }, name)]);

function about(job) {
  if (job.vm) return h('a', { class: 'nowrap', href: vmPath(job.vm) }, job.vm.name);
  if (job.repository) return h('a', { href: api.path(['repositories', job.repository]) }, job.repository);
  return job.kind === 'balance' ? h('a', { href: '/balance' }, subject(job)) : h('a', { href: hostPath(job.host) }, job.host);
}

/** Replaces a job in a list, newest first, or puts it in front. */
export function place(jobs, job) {
  const at = jobs.findIndex((one) => one.id === job.id);
  if (at >= 0) jobs[at] = job;
  else jobs.unshift(job);
}

/** Takes over how far a job is. */
export function advance(jobs, { id, progress: next }) {
  const job = jobs.find((one) => one.id === id);
  if (!job) return false;
  job.progress = next;
  return true;
}

export const isOpen = (job) => job.state === 'queued' || job.state === 'running';

function outcome(job) {
  if (isOpen(job)) return progress(job);
  if (job.error) return h('small', null, failure(job.error));
  if (job.warnings.length > 0) return h('small', { class: 'warn-text' }, job.warnings[0]);
  const { read_bytes: taken, stored_bytes: stored, freed_bytes: freed, points, to, downtime_ms: still, moved } = job.result ?? {};
  if (to !== undefined) return h('small', null, still === undefined ? t('moves.arrived', { to }) : t('moves.arrived-still', { to, ms: number(still) }));
  if (freed !== undefined) return h('small', null, t('gc.outcome', { size: bytes(freed) }));
  if (moved !== undefined) return h('small', null, t('moves.moved', { n: moved }));
  if (stored !== undefined) return h('small', null, t(job.kind === 'restore' ? 'jobs.wrote' : 'jobs.moved', { read: bytes(taken), stored: bytes(stored) }));
  return points === undefined ? '' : h('small', null, t('jobs.handled', { n: points }));
}

/** Jobs with what came of them. */
export function jobTable(jobs, { who, showVm = true, more }) {
  const columns = [
    { label: t('jobs.job'), cell: (job) => [jobLink(job), showVm && h('span', { class: 'narrow' }, ' · ', about(job))] },
    showVm && { label: t('jobs.about'), wide: true, cell: about },
    { label: t('jobs.state'), cell: (job) => chip('job', job.state) },
    { label: t('jobs.outcome'), cell: outcome },
    new Set(jobs.map((job) => job.host)).size > 1 && { label: t('vms.host'), minor: true, cell: (job) => h('a', { href: hostPath(job.host) }, job.host) },
    { label: t('jobs.origin'), minor: true, cell: (job) => (job.origin.policy ? h('a', { href: api.path(['policies', job.origin.policy]) }, job.origin.policy) : job.origin.by) },
    { label: t('jobs.began'), cell: (job) => when(job.started ?? job.created) },
    { label: t('jobs.took'), minor: true, num: true, cell: (job) => elapsed(job.started, job.finished) },
    { label: t('list.actions'), blank: true, num: true, cell: (job) => isOpen(job) && api.may(who, 'operator') ? button(t('action.cancel'), () => cancel(job), { kind: 'quiet small', disabled: job.is_cancelling, label: t('jobs.cancel-label', { kind: t(`kind.${job.kind}`), what: subject(job) }) }) : '' },
  ];
  return table(columns.filter(Boolean), jobs, { label: t('nav.jobs'), id: (job) => job.id, more });
}

/** Cancels a job after asking. */
export async function cancel(job) {
  const sure = await confirm(t('jobs.cancel-title', { kind: t(`kind.${job.kind}`), what: subject(job) }), t('jobs.cancel-text'), t('jobs.cancel'));
  if (sure) await attempt(() => api.post(['jobs', job.id, 'cancel']));
}

/** Asks how, then backs a VM up. Gives the job, or nothing. */
export async function backUp(vm, repositories) {
  const wanted = { vm: vm.uuid };
  const key = api.newKey();
  const sure = await dialog(t('backup.title', { vm: vm.name }), (finish) => [
    h('p', { class: 'soft' }, t('backup.text')),
    field(t('backup.repository'), select(wanted.repository ?? '', [['', t('backup.by-policy')], ...repositories.map((name) => [name, name])], (name) => {
      wanted.repository = name || undefined;
    })),
    field(t('backup.quiesce'), select(wanted.quiesce ?? '', [['', t('backup.by-policy')], ...['auto', 'required', 'off'].map((name) => [name, t(`quiesce.${name}`)])], (name) => {
      wanted.quiesce = name || undefined;
    })),
    check(t('backup.full'), wanted.full, (event) => {
      wanted.full = event.target.checked;
    }, t('backup.full-help')),
    ends(button(t('action.back'), () => finish(null)), button(t('backup.start'), () => finish(true), { kind: 'primary', sign: 'backup' }))]);
  if (!sure) return undefined;
  const job = await attempt(() => api.post(['jobs', 'backup'], wanted, key));
  if (job) toast('good', t('backup.begun', { vm: vm.name }), h('a', { href: api.path(['jobs', job.id]) }, t('backup.watch')));
  return job;
}

/** Things that happened. */
export function feed(events) {
  const tones = { info: 'info', warning: 'warn', error: 'bad' };
  return h('ul', { class: 'feed' }, events.map((event) => h('li', { key: event.id },
    h('span', { class: `dot ${tones[event.severity]}`, role: 'img', 'aria-label': t(`severity.${event.severity}`), title: t(`severity.${event.severity}`) }),
    h('div', null, said(event.said, event.message), ' ', h('small', { class: 'row' },
      event.vm_name && h('a', { href: vmPath(event.vm ?? event.vm_name) }, event.vm_name),
      event.job && h('a', { href: api.path(['jobs', event.job]) }, t('events.job'), ' ', tail(event.job)),
      event.policy && h('a', { href: api.path(['policies', event.policy]) }, event.policy),
      event.repository && h('a', { href: api.path(['repositories', event.repository]) }, event.repository),
      event.host && !event.vm_name && h('a', { href: hostPath(event.host) }, event.host),
      event.node && event.node !== event.host && h('span', { class: 'tag', title: t('cluster.node') }, event.node))),
    when(event.at))));
}

/** A filter that is kept in the address. */
export function keep(go, values) {
  const text = api.path([location.pathname.slice(1)], values).replace(/^\/[^?]*/, location.pathname);
  go(text, { replace: true });
}

/** The names of all nodes, and that of the one that answers. */
export async function nodes() {
  const { nodes: all, node } = await api.get(['cluster']);
  return { names: all.map(({ name }) => name), me: node };
}

/** Whose events or entries are shown, where there are several nodes. */
export const nodeChoice = (names, value, choose) => names.length > 1 && select(value, [['', t('cluster.all-nodes')], ...names.map((name) => [name, name])], choose, t('cluster.node'));

/** Says which nodes did not answer: what they know is not in a list. */
export const missing = (names) => names.length > 0 && h('div', { role: 'status', class: 'tools', key: 'missing' }, note('warn', t('cluster.missing', { names: names.join(', ') })));

// A host's hardware in one word.
export function health(host) {
  const { level } = host.health;
  const tone = { ok: 'good', warning: 'warn', critical: 'bad' }[level] ?? 'plain';
  return h('span', { class: `chip ${tone}` }, t(`hosts.health-${level}`));
}

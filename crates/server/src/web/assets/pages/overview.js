// Everything at a glance: what is protected, what is not and why, what runs, what failed, how full it is.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, failure, number, percent, ratio, said, when } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, empty, gauge, head, note, soon, table, tone } from '../ui.js';
import { advance, feed, jobLink, jobTable, vmPath } from './shared.js';

const STATES = ['protected', 'pending', 'overdue', 'unprotected', 'unknown'];
const WORRIES = ['overdue', 'unprotected', 'unknown'];
const WORRIES_MAX = 8;

export default function overview({ who, load }) {
  let [data, worries] = [null, []];
  const later = soon(load);

  /** VMs that are not protected, with the reason of each. */
  async function worrying() {
    const found = [];
    for (const state of WORRIES) {
      if (data.protection[state] === 0 || found.length >= WORRIES_MAX) continue;
      const page = await api.get(['vms'], { protection: state, limit: WORRIES_MAX - found.length, sort: 'last-point' });
      found.push(...page.items);
    }
    const details = await Promise.all(found.map((vm) => api.get(['vms', vm.uuid]).catch(() => null)));
    return details.filter(Boolean);
  }

  function protection() {
    const counts = data.protection;
    const bad = WORRIES.reduce((sum, state) => sum + counts[state], 0);
    const headline = data.vms.total === 0 ? t('overview.no-vms') : bad === 0 ? t('overview.all-good', { n: data.vms.total }) : t('overview.some-bad', { n: bad, all: data.vms.total });
    return card(t('overview.protection'), { wide: 'two-thirds' }, h('div', { class: 'body stack' },
      h('p', { class: 'headline' }, headline),
      h('div', { class: 'bar tall', 'aria-hidden': 'true' }, STATES.filter((state) => counts[state] > 0).map((state) => h('i', { class: tone('protection', state), style: { width: `${percent(counts[state], data.vms.total)}%` } }))),
      h('div', { class: 'legend' }, STATES.map((state) => h('a', { class: tone('protection', state), href: `/vms?protection=${state}`, key: state }, h('b', null, number(counts[state])), h('span', null, t(`protection.${state}`)))))));
  }

  function capacity() {
    return card(t('overview.capacity'), { wide: 'third' }, data.capacity.length === 0 ? empty(t('repository.none')) : h('div', { class: 'body stack' }, data.capacity.map((one) => h('div', { class: 'stack tight', key: one.repository },
      h('div', { class: 'row' }, h('a', { class: 'strong', href: api.path(['repositories', one.repository]) }, one.repository), !one.is_ok && chip('repository', 'unusable')),
      one.total_bytes !== null && gauge(one.total_bytes - one.free_bytes, one.total_bytes, t('repository.fullness', { name: one.repository })),
      h('small', { class: 'soft' }, one.bytes === null ? t('repository.unmeasured') : [t('overview.stored', { size: bytes(one.bytes) }), one.free_bytes !== null && [' · ', t('overview.free', { size: bytes(one.free_bytes) })], one.reduction !== null && [' · ', t('overview.reduction', { ratio: ratio(one.reduction) })]])))));
  }

  function stats() {
    const { hosts, vms, jobs } = data;
    const stat = (href, label, value, detail) => h('a', { class: 'card stat', href, key: label }, h('span', { class: 'label' }, label), h('b', null, value), h('small', null, detail));
    const away = [['libvirtd_down', 'libvirtd-down'], ['down', 'down'], ['unknown', 'unknown']].filter(([name]) => hosts[name] > 0);
    return h('div', { class: 'stats', key: 'stats' },
      stat('/vms', t('nav.vms'), number(vms.total), t('overview.running-vms', { n: number(vms.running) })),
      stat('/hosts', t('nav.hosts'), number(hosts.total), away.length === 0 ? t('overview.hosts-up') : away.map(([name, state], at) => [at > 0 && ' · ', h('span', { class: 'bad-text' }, `${number(hosts[name])} ${t(`host.${state}`)}`)])),
      stat('/jobs?state=running,queued', t('overview.jobs-now'), number(jobs.running), t('overview.queued', { n: number(jobs.queued) })),
      stat('/jobs?state=failed,interrupted', t('overview.jobs-day'), number(jobs.succeeded), jobs.failed > 0 ? h('span', { class: 'bad-text' }, t('overview.failed', { n: number(jobs.failed) })) : t('overview.none-failed')));
  }

  function attention() {
    const columns = [
      { label: t('vms.vm'), cell: (vm) => h('a', { class: 'name', href: vmPath(vm) }, vm.name) },
      { label: t('vms.protection'), cell: (vm) => chip('protection', vm.protection) },
      { label: t('overview.why'), cell: (vm) => [said(vm.protected.said, vm.protected.reason), vm.protected.last_failure && h('div', null, h('small', null, failure(vm.protected.last_failure)))] },
      { label: t('vms.last-point'), cell: (vm) => when(vm.last_point) },
      { label: t('vms.next-run'), cell: (vm) => when(vm.next_run) },
    ];
    return card(t('overview.attention'), {}, worries.length === 0 ? empty(t('overview.nothing-wrong')) : table(columns, worries, { label: t('overview.attention'), id: (vm) => vm.uuid }));
  }

  function failures() {
    const columns = [
      { label: t('jobs.job'), cell: (job) => [jobLink(job), ' ', job.vm?.name ?? job.repository] },
      { label: t('overview.why'), cell: (job) => [job.error ? failure(job.error) : t(`job.${job.state}`), job.error?.retry_at && h('div', null, h('small', null, t('jobs.retry'), ' ', when(job.error.retry_at)))] },
      { label: t('jobs.ended'), cell: (job) => when(job.finished) },
    ];
    return card(t('overview.failures'), { wide: 'half', end: h('a', { href: '/jobs?state=failed,interrupted' }, t('list.all')) }, data.failures.length === 0 ? empty(t('overview.no-failures')) : table(columns, data.failures.slice(0, 6), { label: t('overview.failures'), id: (job) => job.id }));
  }

  return {
    title: () => t('nav.overview'),
    async load() {
      data = await api.get(['overview']);
      worries = await worrying();
    },
    end: later.stop,
    on: {
      progress: (message) => advance(data.running, message),
      job: later, vm: later, 'vm-removed': later, host: later, policy: later, repository: later, event: later,
    },
    view: () => [
      head(t('nav.overview')),
      h('div', { class: 'stack', key: 'all' },
        data.vms.total > 0 && data.protection.unprotected === data.vms.total && note('info', t('overview.first-policy'), h('a', { href: '/policies/+new' }, t('policies.new'))),
        stats(),
        h('div', { class: 'grid' }, protection(), capacity(), attention(),
          data.running.length > 0 && card(t('overview.running'), { end: h('a', { href: '/jobs' }, t('list.all')) }, jobTable(data.running, { who })),
          failures(),
          card(t('overview.events'), { wide: 'half', end: h('a', { href: '/events' }, t('list.all')) }, data.events.length === 0 ? empty(t('events.none')) : feed(data.events.slice(0, 7))))),
    ],
  };
}

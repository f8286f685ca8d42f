// One VM: whether it is protected and why, its restore points on a line of time, its disks, what each policy makes of it.

import * as api from '../api.js';
import { timeline } from '../chart.js';
import { h } from '../dom.js';
import { bytes, clock, duration, failure, number, rate, said, when } from '../format.js';
import { t } from '../i18n.js';
import { brief, button, card, chip, choices, door, empty, facts, head, note, soon, table, tag, tone } from '../ui.js';
import { migrate } from './moves.js';
import { advance, backUp, hostPath, jobTable, place, policyLinks, vmPath } from './shared.js';

const POINTS_MAX = 500;
const POINTS_SHOWN = 12;
const SPANS = [7, 30, 90];

export default function vm({ params, who, update, load }) {
  let [data, points, verdicts, jobs, repositories, hosts] = [null, [], [], [], [], []];
  let [days, isAll] = [30, false];

  const later = soon(load);

  async function start() {
    const job = await backUp(data, repositories);
    if (!job) return;
    place(jobs, job);
    update();
  }

  async function move() {
    const job = await migrate(data, hosts);
    if (!job) return;
    place(jobs, job);
    update();
  }

  const restorePath = (point) => `${vmPath(data, 'restore')}?point=${encodeURIComponent(point.id)}&repository=${encodeURIComponent(point.repository)}`;

  function protection() {
    const { protected: state } = data;
    return card(t('vms.protection'), { wide: 'half' }, h('div', { class: 'body stack' },
      note(tone('protection', state.state), h('b', null, t(`protection.${state.state}`)), said(state.said, state.reason)),
      state.last_failure && note('bad', h('b', null, t('vm.last-failure'), ' ', when(state.last_failure.at)), failure(state.last_failure), h('a', { href: api.path(['jobs', state.last_failure.job]) }, t('vm.open-job'))),
      facts(
        [t('vms.last-point'), state.last_good ? [clock(state.last_good.taken), ' · ', when(state.last_good.taken), ' · ', state.last_good.repository] : t('vm.never')],
        [t('vm.rpo'), state.rpo_s === null ? t('vm.no-rpo') : duration(state.rpo_s)],
        [t('vms.next-run'), state.next ? [when(state.next.at), ` · ${state.next.policy}`, state.next.waiting_for && h('div', null, h('small', { class: 'soft' }, said(state.next.waiting_said, state.next.waiting_for)))] : t('vm.no-next')],
        [t('vms.policies'), policyLinks(state.policies)])));
  }

  // Whoever is off answers nothing, which is no fault of an agent.
  function agent(guest) {
    if (guest === null) return t('vm.no-agent');
    if (data.state !== 'running') return '–';
    return guest.is_agent_connected ? t('vm.agent') : t('vm.agent-away');
  }

  function machine() {
    const { guest, usage } = data;
    return card(t('vm.machine'), { wide: 'half' }, h('div', { class: 'body' }, facts(
      [t('vms.host'), h('a', { href: hostPath(data.host) }, data.host)],
      data.also_on.length > 0 && [t('vm.also-on'), data.also_on.map((name, at) => [at > 0 && ', ', h('a', { href: hostPath(name) }, name)])],
      data.title && [t('vm.title'), data.title],
      [t('vm.size'), [data.vcpus !== null && t('vm.vcpus', { n: data.vcpus }), data.memory_bytes !== null && ` · ${bytes(data.memory_bytes)}`]],
      usage && [t('vm.usage'), t('vm.usage-of', { cpu: number(usage.cpu * 100), memory: bytes(usage.memory_rss_bytes), read: rate(usage.read_bytes_s), write: rate(usage.write_bytes_s) })],
      guest?.hostname && [t('vm.guest-name'), guest.hostname],
      guest?.os && [t('vm.guest-os'), guest.os],
      [t('vm.guest'), agent(guest)],
      ...data.networks.map((network, at) => [at === 0 ? t('vm.networks') : '', [network.source ?? '–', ' ', h('code', null, network.mac), ' ', network.model, network.addresses.length > 0 && h('div', null, network.addresses.map((address, nth) => [nth > 0 && ', ', h('code', null, address)]))]]),
      ...Object.entries(data.metadata).map(([name, value]) => [h('code', null, name), value]),
      ['UUID', h('code', null, data.uuid)])));
  }

  function pointTable() {
    const columns = [
      { label: t('point.taken'), cell: (point) => clock(point.taken) },
      { label: t('point.kind'), minor: true, cell: (point) => t(`point.${point.kind}`) },
      { label: t('point.consistency'), cell: (point) => h('span', { title: point.quiesce.reason ?? undefined }, t(`quiesced.${point.quiesce.outcome}`)) },
      { label: t('point.read'), minor: true, num: true, cell: (point) => bytes(point.read_bytes) },
      { label: t('point.stored'), num: true, cell: (point) => bytes(point.stored_bytes) },
      { label: t('point.took'), minor: true, num: true, cell: (point) => duration(point.duration_ms / 1000) },
      { label: t('nav.repository'), cell: (point) => [point.repository, point.held && [' ', h('span', { class: 'tag', title: point.held }, t('point.held'))], point.warnings.length > 0 && [' ', h('span', { class: 'chip warn', title: point.warnings.join('\n') }, t('point.warnings', { n: point.warnings.length }))]] },
      { label: t('point.id'), minor: true, cell: (point) => brief(point.id) },
      { label: t('list.actions'), blank: true, num: true, cell: (point) => api.may(who, 'operator') ? door(t('vm.restore'), restorePath(point), { kind: 'small' }) : '' },
    ];
    const shown = isAll ? points : points.slice(0, POINTS_SHOWN);
    const more = shown.length < points.length && (() => {
      isAll = true;
      update();
    });
    return table(columns, shown, { label: t('vm.points'), id: (point) => point.repository + point.id, more });
  }

  function restorePoints() {
    const spans = choices(t('vm.span'), days, SPANS.map((n) => [n, t('vm.days', { n })]), (n) => {
      days = n || days;
      update();
    });
    return card(t('vm.points'), { end: spans },
      points.length === 0 ? empty(t('vm.no-points')) : [
        h('div', { class: 'body', key: 'line' }, timeline(points, days, restorePath), h('div', { class: 'row' }, h('span', { class: 'key full' }, t('point.full')), h('span', { class: 'key' }, t('point.incremental')), h('span', { class: 'soft' }, t('vm.timeline-help')))),
        pointTable()]);
  }

  function disks() {
    const columns = [
      { label: t('vm.disk'), cell: (disk) => h('span', { class: 'strong' }, disk.target) },
      { label: t('vm.device'), cell: (disk) => [disk.device, ' · ', disk.format, disk.is_read_only && [' · ', t('vm.read-only')]] },
      { label: t('vm.in-backups'), cell: (disk) => h('span', { class: `chip ${disk.is_backed_up ? 'good' : 'mute'}` }, disk.is_backed_up ? t('vm.yes') : t('vm.no')) },
      { label: t('vms.size'), num: true, cell: (disk) => bytes(disk.size_bytes) },
      { label: t('vm.allocated'), minor: true, num: true, cell: (disk) => bytes(disk.allocated_bytes) },
      { label: t('vm.source'), cell: (disk) => h('code', null, disk.source || '–') },
    ];
    return card(t('vm.disks'), {}, table(columns, data.disks, { label: t('vm.disks'), id: (disk) => disk.target }));
  }

  function explanation() {
    const columns = [
      { label: t('policies.policy'), cell: (verdict) => h('a', { class: 'name', href: api.path(['policies', verdict.policy]) }, verdict.policy) },
      { label: t('vm.selected'), cell: (verdict) => h('span', { class: `chip ${verdict.is_selected ? 'good' : 'mute'}` }, verdict.is_selected ? t('vm.yes') : t('vm.no')) },
      { label: t('overview.why'), cell: (verdict) => h('ul', null, verdict.reasons.map((reason, at) => h('li', null, said(verdict.reasons_said?.[at], reason)))) },
      { label: t('vms.next-run'), cell: (verdict) => when(verdict.next_run) },
    ];
    return card(t('vm.explain'), {}, verdicts.length === 0 ? empty(t('policies.none'), door(t('policies.new'), '/policies/+new')) : table(columns, verdicts, { label: t('vm.explain'), id: (verdict) => verdict.policy }));
  }

  const isMine = (job) => job.vm?.uuid === data.uuid;
  return {
    title: () => data?.name ?? params.vm,
    async load() {
      const [detail, page, explain, recent, all, others] = await Promise.all([
        api.get(['vms', params.vm]),
        api.get(['vms', params.vm, 'points'], { limit: POINTS_MAX }),
        api.get(['vms', params.vm, 'explain']).catch(() => ({ policies: [] })),
        api.get(['jobs'], { vm: params.vm, limit: 8 }),
        api.get(['repositories']), api.get(['hosts'])]);
      hosts = others.items.filter(({ name }) => name !== detail.host);
      [data, points, verdicts, jobs] = [detail, page.items, explain.policies, recent.items];
      repositories = all.map(({ name }) => name);
    },
    on: {
      progress: (message) => advance(jobs, message),
      job(job) {
        if (!isMine(job)) return false;
        place(jobs, job);
        if (job.finished) later();
        return true;
      },
      vm(next) {
        return next.uuid === data.uuid && later();
      },
    },
    end: later.stop,
    view: () => [
      head(data.name, {
        crumb: h('a', { href: '/vms' }, t('nav.vms')),
        beside: [chip('power', data.state), chip('protection', data.protection), data.tags.map(tag)],
        actions: api.may(who, 'operator') && [
          hosts.length > 0 && button(t('moves.migrate'), move, { sign: 'move', disabled: jobs.some((job) => job.kind === 'migrate' && !job.finished) }),
          points.length > 0 && door(t('vm.restore-from'), vmPath(data, 'restore'), { sign: 'restore' }),
          button(t('backup.now'), start, { kind: 'primary', sign: 'backup', disabled: jobs.some((job) => job.kind === 'backup' && !job.finished) })],
        lead: data.is_stale && t('vms.stale-help'),
      }),
      h('div', { class: 'stack', key: 'all' },
        h('div', { class: 'grid' }, protection(), machine()),
        restorePoints(), disks(), explanation(),
        card(t('vm.jobs'), { end: h('a', { href: api.path(['jobs'], { vm: data.uuid }) }, t('list.all')) }, jobs.length === 0 ? empty(t('jobs.none')) : jobTable(jobs, { who, showVm: false }))),
    ],
  };
}

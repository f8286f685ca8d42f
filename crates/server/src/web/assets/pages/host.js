// One host: what is known of it and since when, how full it is, its VMs and its jobs.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, clock, number, when } from '../format.js';
import { t } from '../i18n.js';
import { button, card, chip, empty, facts, gauge, head, note, soon, table, tone } from '../ui.js';
import { drain, resume } from './moves.js';
import { advance, health, jobTable, place, vmPath } from './shared.js';

const VMS_MAX = 100;
const JOBS_MAX = 8;

export default function host({ params, who, load, update }) {
  let [data, vms, next, total, jobs] = [null, [], null, 0, []];
  const later = soon(load);

  async function more() {
    const page = await api.get(['vms'], { host: data.name, limit: VMS_MAX, cursor: next });
    vms.push(...page.items);
    next = page.next;
    update();
  }

  async function empties() {
    const job = await drain(data);
    if (!job) return;
    place(jobs, job);
    load();
  }

  async function resumes() {
    if (await resume(data)) load();
  }

  function about() {
    return card(t('hosts.about'), { wide: 'half' }, h('div', { class: 'body stack' },
      note(tone('host', data.state), h('b', null, t(`hosts.${data.state}-means`)), data.reason),
      facts(
        [t('hosts.since-long'), [clock(data.since), ' · ', when(data.since)]],
        data.seen && [t('hosts.seen'), when(data.seen)],
        data.drained && [t('moves.drained'), [when(data.drained.since), ` · ${data.drained.by}`]],
        data.health && [t('hosts.health'), [health(data), ' ', when(data.health.since), data.health.troubles.map((trouble) => h('div', { key: trouble.text }, h('small', null, trouble.text))), data.health.unread.map((why) => h('div', { key: why }, h('small', { class: 'soft' }, t('hosts.health-unread', { why }))))]],
        [t('nav.vms'), t('hosts.vms', { all: number(data.vms), running: number(data.vms_running) })],
        [t('hosts.jobs'), number(data.jobs_running)],
        [t('hosts.versions'), `libvirt ${data.libvirt_version ?? '–'} · QEMU ${data.qemu_version ?? '–'}`],
        [t('hosts.uri'), h('code', null, data.uri)],
        data.uuid && ['UUID', h('code', null, data.uuid)])));
  }

  function meter(label, part, whole, text, beside) {
    return h('div', { class: 'stack tight', key: label },
      h('div', { class: 'row spread' }, h('span', { class: 'label' }, label, beside), h('small', { class: 'soft' }, text)),
      gauge(part, whole, label));
  }

  function use() {
    const { cpus, load: busy, memory_bytes: all, memory_available_bytes: free, storage } = data;
    const known = [
      cpus !== null && busy !== null && meter(t('hosts.load'), busy, cpus, t('hosts.load-of', { load: number(busy, 2), cpus: number(cpus) })),
      all !== null && free !== null && meter(t('hosts.memory'), all - free, all, t('hosts.free-of', { free: bytes(free), total: bytes(all) })),
      ...storage.map((one) => meter(one.path, one.total_bytes - one.free_bytes, one.total_bytes, t('hosts.free-of', { free: bytes(one.free_bytes), total: bytes(one.total_bytes) }),
        [' ', one.is_shared && h('span', { class: 'tag' }, t('hosts.shared')), ' ', h('small', { class: 'soft' }, t('hosts.disks', { n: one.disks }))])),
    ].filter(Boolean);
    return card(t('hosts.use'), { wide: 'half' }, known.length === 0 ? empty(t('hosts.use-unknown')) : h('div', { class: 'body stack' }, known));
  }

  function machines() {
    const columns = [
      { label: t('vms.vm'), cell: (vm) => h('a', { class: 'name', href: vmPath(vm) }, vm.name) },
      { label: t('vms.state'), cell: (vm) => [chip('power', vm.state), vm.is_stale && [' ', h('small', { title: t('vms.stale-help') }, t('vms.stale'))]] },
      { label: t('vms.protection'), cell: (vm) => chip('protection', vm.protection) },
      { label: t('vms.last-point'), cell: (vm) => when(vm.last_point) },
      { label: t('vms.next-run'), minor: true, cell: (vm) => when(vm.next_run) },
      { label: t('vms.size'), minor: true, num: true, cell: (vm) => bytes(vm.size_bytes) },
    ];
    return card(t('nav.vms'), { end: h('a', { href: api.path(['vms'], { host: data.name }) }, t('vms.count', { n: total, shown: number(total) })) },
      vms.length === 0 ? empty(t('hosts.no-vms')) : table(columns, vms, { label: t('nav.vms'), id: (vm) => vm.uuid, more: next && more }));
  }

  return {
    title: () => data?.name ?? params.host,
    async load() {
      data = await api.get(['hosts', params.host]);
      const [page, recent] = await Promise.all([api.get(['vms'], { host: data.name, limit: VMS_MAX }), api.get(['jobs'], { host: data.name, limit: JOBS_MAX })]);
      [vms, next, total, jobs] = [page.items, page.next, page.total, recent.items];
    },
    end: later.stop,
    on: {
      progress: (message) => advance(jobs, message),
      job(job) {
        if (job.host !== data.name && job.proxy !== data.name) return false;
        place(jobs, job);
        jobs.length = Math.min(jobs.length, JOBS_MAX);
        return true;
      },
      host(host) {
        if (host.name !== data.name) return false;
        data = { ...host, jobs_running: data.jobs_running, drained: data.drained };
        return true;
      },
      vm(vm) {
        const at = vms.findIndex((one) => one.uuid === vm.uuid);
        if (at >= 0 && vm.host === data.name) {
          vms[at] = vm;
          return true;
        }
        return (at >= 0 || vm.host === data.name) && later();
      },
      'vm-removed': later,
    },
    view: () => [
      head(data.name, { crumb: h('a', { href: '/hosts' }, t('nav.hosts')), actions: api.may(who, 'operator') && (data.drained ? [button(t('moves.resume'), resumes, { kind: 'primary' })] : [button(t('moves.drain'), empties, { sign: 'move', disabled: data.state !== 'up' })]), beside: [chip('host', data.state), data.drained && h('span', { class: 'chip warn' }, t('moves.drained')), data.is_local && h('span', { class: 'tag' }, t('hosts.local'))] }),
      h('div', { class: 'stack', key: 'all' },
        h('div', { class: 'grid' }, about(), use()),
        machines(),
        card(t('nav.jobs'), { end: h('a', { href: api.path(['jobs'], { host: data.name }) }, t('list.all')) }, jobs.length === 0 ? empty(t('jobs.none')) : jobTable(jobs, { who }))),
    ],
  };
}

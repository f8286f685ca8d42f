// High availability: who is where, what is fenced and by which proof, what is down and what it waits for, room for failures.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, duration, number } from '../format.js';
import { t } from '../i18n.js';
import { attempt, button, card, chip, dialog, empty, ends, facts, field, gauge, head, note, soon, table } from '../ui.js';
import { feed, hostPath, vmPath } from './shared.js';

// Heartbeats are no messages of the stream.
const AGAIN_MS = 2000;
const EVENTS_MAX = 12;
// Silent for longer than a heartbeat takes, it is worth a number.
const SILENT_MS = 3000;

export default function ha({ who, load }) {
  let [data, room, happened, off] = [null, null, [], null];
  const later = soon(load, 300);
  const again = setInterval(() => !document.hidden && load(), AGAIN_MS);
  const isAdmin = api.may(who, 'admin');

  async function turn(verb) {
    let reason = '';
    const isSure = await dialog(t(`ha.${verb}`), (finish) => [
      h('p', null, t(`ha.${verb}-means`)),
      field(t('ha.reason'), h('input', { type: 'text', maxlength: '200', oninput: (event) => { reason = event.target.value; } })),
      ends(button(t('action.cancel'), () => finish(null)), button(t(`ha.${verb}`), () => finish(true), { kind: verb === 'disarm' ? 'primary danger' : 'primary' }))]);
    if (!isSure) return;
    await attempt(() => api.post(['ha', verb], { reason }, api.newKey()));
    load();
  }

  async function start(vm) {
    await attempt(() => api.post(['ha', 'vms', vm.uuid, 'start'], {}, api.newKey()));
    load();
  }

  // The active one is ended before its standby leads.
  async function hand(vm) {
    let reason = '';
    const isSure = await dialog(t('ha.switch-title', { name: vm.name }), (finish) => [
      h('p', null, t('ha.switch-means', { name: vm.name, standby: vm.pair.other })),
      field(t('ha.reason'), h('input', { type: 'text', maxlength: '200', oninput: (event) => { reason = event.target.value; } })),
      ends(button(t('action.cancel'), () => finish(null)), button(t('ha.switch'), () => finish(true), { kind: 'primary danger' }))]);
    if (!isSure) return;
    await attempt(() => api.post(['ha', 'vms', vm.uuid, 'switch'], { reason }, api.newKey()));
    load();
  }

  const isDown = (vm) => vm.should_run && vm.phase !== 'running';

  function summary() {
    const down = data.vms.filter(isDown);
    const serving = data.hosts.filter((host) => host.phase === 'armed' && !host.maintenance);
    const fenced = data.hosts.filter((host) => host.phase === 'fencing' || host.phase === 'fenced');
    const stat = (label, value, detail, tone = '') => h('div', { class: 'card stat', key: label }, h('span', { class: 'label' }, label), h('b', { class: tone }, value), h('small', null, detail));
    return h('div', { class: 'stats', key: 'stats' },
      stat(t('ha.protection'), data.armed ? t('ha.armed') : t('ha.disarmed'), data.note, data.armed ? '' : 'warn-text'),
      stat(t('ha.hosts'), t('cluster.of', { part: number(serving.length), all: number(data.hosts.length) }), fenced.length > 0 ? t('ha.fenced-hosts', { names: fenced.map((host) => host.name).join(', ') }) : t('ha.in-service'), fenced.length > 0 ? 'bad-text' : ''),
      stat(t('ha.vms'), t('cluster.of', { part: number(data.vms.length - down.length), all: number(data.vms.length) }), down.length > 0 ? t('ha.down', { names: down.slice(0, 4).map((vm) => vm.name).join(', ') }) : t('ha.as-wanted'), down.length > 0 ? 'bad-text' : ''),
      stat(t('ha.room'), room.enough ? t('ha.enough') : t('ha.short'), t('ha.failures', { n: room.failures }), room.enough ? '' : 'bad-text'));
  }

  const place = (vm) => h('li', { key: vm.uuid }, h('a', { class: `chip ${isDown(vm) ? 'bad' : vm.ready || !vm.should_run ? 'good' : 'info'}`, href: vmPath(vm), title: vm.waits ?? vm.note }, vm.name));

  function host(one) {
    const mine = data.vms.filter((vm) => vm.host === one.name);
    const memory = room.hosts.find((of) => of.host === one.name);
    const isSilent = one.silent_ms !== null && one.silent_ms > SILENT_MS && one.phase !== 'out';
    return h('section', { class: 'card place', key: one.name, 'data-host': one.name },
      h('header', null, h('h2', null, h('a', { class: 'name', href: hostPath(one.name) }, one.name)), h('div', { class: 'end' }, chip('ha-phase', one.phase), ' ', chip('ha-grade', one.grade))),
      h('div', { class: 'body stack' },
        one.maintenance && note('warn', t('ha.maintenance')),
        isSilent && h('p', { class: 'bad-text' }, t('ha.silent', { time: duration(one.silent_ms / 1000) })),
        one.fencing && note('bad', h('b', null, t('ha.waits-for-proof')), one.fencing),
        one.proof && one.phase === 'fenced' && note('info', h('b', null, t('ha.proved')), one.proof),
        memory && h('div', { class: 'meter' }, gauge(memory.used_bytes, memory.memory_bytes, t('hosts.memory')), h('small', null, t('hosts.free-of', { free: bytes(Math.max(0, memory.memory_bytes - memory.used_bytes)), total: bytes(memory.memory_bytes) }))),
        mine.length === 0 ? h('p', { class: 'soft' }, t('ha.no-vms')) : h('ul', { class: 'choices', 'aria-label': t('ha.vms') }, mine.map(place)),
        facts([t('ha.watchdog'), t(`ha-watchdog.${one.watchdog}`)], [t('ha.devices'), number(one.fence_devices)], [t('ha.epoch'), number(one.epoch)]),
        one.reasons.length > 0 && h('ul', { class: 'stack tight' }, one.reasons.map((reason) => h('li', { key: reason }, h('small', null, reason))))));
  }

  function nobody() {
    const lost = data.vms.filter((vm) => !vm.host && vm.should_run);
    return lost.length > 0 && note('bad', h('b', null, t('ha.nobody')), h('ul', { class: 'choices' }, lost.map(place)));
  }

  function vms() {
    const columns = [
      { label: t('ha.vm'), cell: (vm) => h('a', { class: 'name', href: vmPath(vm) }, vm.name) },
      { label: t('hosts.host'), cell: (vm) => (vm.host ? h('a', { href: hostPath(vm.host) }, vm.host) : '–') },
      { label: t('hosts.state'), cell: (vm) => [chip('ha-vm', vm.phase), !vm.should_run && [' ', h('small', null, t('ha.meant-off'))], vm.should_run && vm.phase === 'running' && !vm.ready && [' ', h('small', null, t('ha.not-ready'))]] },
      data.vms.some((vm) => vm.pair) && { label: t('ha.pair'), cell: (vm) => vm.pair && [t(`ha.pair-${vm.pair.role}`, { other: vm.pair.other }), vm.pair.role === 'active' && !vm.pair.takes_over && h('div', null, h('small', { class: 'warn-text' }, vm.pair.settled ? t('ha.pair-alone') : t('ha.pair-switches')))] },
      { label: t('ha.tier'), minor: true, num: true, cell: (vm) => number(vm.policy.tier) },
      { label: t('ha.generation'), minor: true, num: true, cell: (vm) => number(vm.generation) },
      { label: t('ha.services'), minor: true, cell: (vm) => ((vm.policy.services ?? []).length === 0 ? '–' : vm.policy.services.map((one) => h('div', { key: one.check }, h('code', null, one.check)))) },
      { label: t('ha.last'), cell: (vm) => h('small', { class: vm.waits ? 'bad-text' : '' }, vm.waits ?? vm.note) },
      api.may(who, 'operator') && { label: t('list.actions'), blank: true, num: true, cell: (vm) => [
        vm.phase === 'stopped' && !vm.should_run && button(t('ha.start'), () => start(vm), { kind: 'quiet small', label: t('ha.start-label', { name: vm.name }) }),
        vm.pair?.takes_over && button(t('ha.switch'), () => hand(vm), { kind: 'quiet small', label: t('ha.switch-title', { name: vm.name }) })] },
    ];
    return card(t('ha.vms'), {}, data.vms.length === 0 ? empty(t('ha.none'), h('code', null, 'virtward ha enable VM')) : table(columns.filter(Boolean), data.vms, { label: t('ha.vms'), id: (vm) => vm.uuid }));
  }

  function losses() {
    if (room.losses.length === 0) return false;
    const columns = [
      { label: t('ha.without'), cell: (loss) => (loss.hosts.length > 0 ? loss.hosts.join(' + ') : t('ha.any-loss')) },
      { label: t('ha.stay-down'), cell: (loss) => loss.vms.join(', ') },
      { label: t('ha.why'), cell: (loss) => h('small', null, loss.why) },
    ];
    return card(t('ha.room'), {}, table(columns, room.losses, { label: t('ha.room'), id: (loss) => loss.hosts.join() }));
  }

  return {
    title: () => t('ha.title'),
    async load() {
      try {
        const [status, capacity, page] = await Promise.all([api.get(['ha']), api.get(['ha', 'capacity']), api.get(['events'], { kind: 'ha', node: 'all', limit: EVENTS_MAX })]);
        [data, room, happened, off] = [status, capacity, page.items, null];
      } catch (problem) {
        // Not configured on this host: a state, not a failure.
        if (problem.code !== 'conflict') throw problem;
        off = problem;
      }
    },
    end() {
      clearInterval(again);
      later.stop();
    },
    on: { host: later, event: later, vm: later },
    view: () => (off ? [head(t('ha.title')), h('div', { key: 'off' }, note('info', h('b', null, t('ha.off')), t('ha.off-help')))] : [
      head(t('ha.title'), { actions: isAdmin && (data.armed ? button(t('ha.disarm'), () => turn('disarm'), { kind: 'danger' }) : button(t('ha.arm'), () => turn('arm'), { kind: 'primary' })) }),
      h('div', { class: 'stack', key: 'all' },
        h('div', { role: 'status', class: 'worries stack tight', key: 'worries' },
          data.state_error && note('bad', h('b', null, t('cluster.state-lost')), data.state_error),
          !data.armed && note('warn', h('b', null, t('ha.disarmed')), t('ha.disarm-means')),
          nobody()),
        summary(),
        h('div', { class: 'places', key: 'map' }, data.hosts.map(host)),
        vms(), losses(),
        card(t('nav.events'), { end: h('a', { href: '/events' }, t('list.all')) }, happened.length === 0 ? empty(t('events.none')) : feed(happened))),
    ]),
  };
}

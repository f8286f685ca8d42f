// One job: how far it is, what came of it, what it did.

import * as api from '../api.js';
import { h } from '../dom.js';
import { absolute, bytes, clock, duration, elapsed, failure, number, percent, second, when } from '../format.js';
import { t, word } from '../i18n.js';
import { brief, button, card, chip, door, empty, facts, head, note, progress, subject, tail } from '../ui.js';
import { stays } from './moves.js';
import { cancel, hostPath, isOpen, vmPath } from './shared.js';

const LOG_MAX = 1000;

export default function job({ params, who, update }) {
  let [data, log, isReading, isWanted] = [null, [], false, false];

  /** Progress in steps of ten, so that a screen reader is told now and then and not every second. */
  function spoken({ progress: { done_bytes: done, total_bytes: total } }) {
    return h('div', { class: 'visually-hidden', role: 'status' }, total > 0 && t('jobs.spoken', { n: Math.floor(percent(done, total) / 10) * 10 }));
  }

  /** What was added to the log. Asked again meanwhile, it reads once more afterwards: the last lines are the most wanted. */
  async function read() {
    isWanted = true;
    if (isReading) return;
    isReading = true;
    try {
      while (isWanted) {
        isWanted = false;
        const after = log.length > 0 ? log[log.length - 1].seq : 0;
        log.push(...(await api.get(['jobs', params.job, 'log'], { after, limit: LOG_MAX })));
      }
    } finally {
      isReading = false;
    }
    update();
  }

  function result() {
    const { point, kind, read_bytes: taken, stored_bytes: stored, vm, is_started: isStarted, disks, points, damaged, freed_bytes: freed, pending_bytes: pending, from, to, downtime_ms: still, total_ms: total, sent_bytes: sent, moved, left } = data.result;
    return card(t('jobs.result'), { wide: 'half' }, h('div', { class: 'body' }, facts(
      point && [t('jobs.point'), [brief(point), kind && ` ${t(`point.${kind}`)}`]],
      taken !== undefined && [t('jobs.read'), bytes(taken)],
      stored !== undefined && [data.kind === 'restore' ? t('jobs.written') : t('jobs.stored'), bytes(stored)],
      freed !== undefined && [t('gc.freed'), bytes(freed)],
      pending > 0 && [t('gc.pending'), bytes(pending)],
      vm && [t('vms.vm'), [h('a', { href: vmPath(vm) }, vm.name), isStarted && [' ', t('jobs.started-vm')]]],
      ...(disks ?? []).map((disk) => [disk.target, [h('code', null, disk.path), ` ${bytes(disk.size_bytes)}`]]),
      points !== undefined && [t('jobs.points'), number(points)],
      damaged !== undefined && [t('jobs.damaged'), number(damaged)],
      from && [t('moves.from'), from],
      to && [t('moves.to'), to],
      still !== undefined && [t('moves.downtime'), t('moves.ms', { ms: number(still) })],
      total !== undefined && [t('jobs.took'), duration(total / 1000)],
      sent !== undefined && [t('moves.sent'), bytes(sent)],
      moved !== undefined && [t('nav.vms'), t('moves.moved', { n: moved })]), left?.length > 0 && stays(left)));
  }

  function state() {
    return card(t('jobs.facts'), { wide: data.result && Object.keys(data.result).length > 0 ? 'half' : '' }, h('div', { class: 'body' }, facts(
      data.vm && [t('vms.vm'), h('a', { href: vmPath(data.vm) }, data.vm.name)],
      data.repository && [t('nav.repository'), h('a', { href: api.path(['repositories', data.repository]) }, data.repository)],
      [t('vms.host'), h('a', { href: hostPath(data.host) }, data.host)],
      data.proxy && [t('jobs.proxy'), h('a', { href: hostPath(data.proxy) }, data.proxy)],
      [t('jobs.origin'), data.origin.policy ? [h('a', { href: api.path(['policies', data.origin.policy]) }, data.origin.policy), data.origin.attempt > 1 && [' · ', t('jobs.attempt', { n: data.origin.attempt })]] : data.origin.by],
      data.origin.after && [t('jobs.after'), h('a', { href: api.path(['jobs', data.origin.after]) }, tail(data.origin.after))],
      [t('jobs.created'), clock(data.created)],
      [t('jobs.began'), clock(data.started)],
      [t('jobs.ended'), clock(data.finished)],
      [t('jobs.took'), elapsed(data.started, data.finished)])));
  }

  function entries() {
    return card(t('jobs.log'), {}, log.length === 0 ? empty(t('jobs.no-log')) : h('ol', { class: 'log', tabindex: '0', 'aria-label': t('jobs.log') }, log.map((entry) =>
      h('li', { key: entry.seq, class: entry.level }, h('time', { datetime: entry.at, title: absolute(entry.at) }, second(entry.at)), h('span', null, entry.level !== 'info' && `${t(`severity.${entry.level}`)}: `, word(`phase.${entry.message.replaceAll(' ', '-')}`, entry.message))))));
  }

  return {
    title: () => (data ? `${t(`kind.${data.kind}`)} ${subject(data)}` : t('jobs.job')),
    async load() {
      data = await api.get(['jobs', params.job]);
      log = [];
      await read();
    },
    on: {
      job(next) {
        if (next.id !== data.id) return false;
        data = next;
        read();
        return true;
      },
      progress(message) {
        if (message.id !== data.id) return false;
        data.progress = message.progress;
        read();
        return true;
      },
    },
    view: () => [
      head(`${t(`kind.${data.kind}`)} · ${subject(data)}`, {
        crumb: h('a', { href: '/jobs' }, t('nav.jobs')),
        beside: chip('job', data.state),
        actions: [
          isOpen(data) && api.may(who, 'operator') && button(data.is_cancelling ? t('jobs.cancelling') : t('jobs.cancel'), () => cancel(data), { kind: 'danger', sign: 'stop', disabled: data.is_cancelling }),
          data.kind === 'restore' && data.result?.vm && door(t('jobs.open-vm'), vmPath(data.result.vm), { kind: 'primary' })],
      }),
      h('div', { class: 'stack', key: 'all' },
        isOpen(data) && h('div', { class: 'card', key: 'progress' }, h('div', { class: 'body' }, progress(data), spoken(data))),
        data.error && h('div', { role: 'alert', key: 'error' }, note('bad', h('b', null, failure(data.error)), data.error.hint, data.error.retry_at && h('span', null, t('jobs.retry'), ' ', when(data.error.retry_at)))),
        data.warnings.length > 0 && note('warn', ...data.warnings),
        h('div', { class: 'grid' }, state(), data.result && Object.keys(data.result).length > 0 && result(), entries())),
    ],
  };
}

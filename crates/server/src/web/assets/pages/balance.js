// Balance: how loaded hosts are, what should move where and why, and what moved before.

import * as api from '../api.js';
import { h } from '../dom.js';
import { clock, duration, number, when } from '../format.js';
import { t } from '../i18n.js';
import { attempt, button, card, empty, gauge, head, note, table, toast } from '../ui.js';
import { moveTable, stays } from './moves.js';
import { hostPath } from './shared.js';

const ROUNDS_MAX = 50;
const WATCH_S = 5;

export default function balance({ who, update, load }) {
  let [status, rounds, round, isBusy] = [null, [], null, false];

  async function plan() {
    isBusy = true;
    update();
    round = (await attempt(() => api.post(['balance', 'plan'], { interval_s: WATCH_S }))) ?? round;
    isBusy = false;
    update();
  }

  async function apply() {
    isBusy = true;
    update();
    const job = await attempt(() => api.post(['balance', 'apply'], { interval_s: WATCH_S }, api.newKey()));
    isBusy = false;
    if (job) toast('good', t('balance.begun'), h('a', { href: api.path(['jobs', job.id]) }, t('backup.watch')));
    load();
  }

  const change = (before, after) => h('div', { class: 'meter' }, gauge(before, 100, `${before} %`),
    h('small', null, before === after ? `${number(before)} %` : `${number(before)} % \u2192 ${number(after)} %`));

  function hosts() {
    const columns = [
      { label: t('vms.host'), cell: (host) => h('a', { class: 'name', href: hostPath(host.host) }, host.host) },
      { label: t('balance.cpu'), cell: (host) => change(host.cpu_percent, host.cpu_percent_after) },
      { label: t('hosts.memory'), cell: (host) => change(host.memory_percent, host.memory_percent_after) },
      { label: t('nav.vms'), num: true, cell: (host) => (host.vms === host.vms_after ? number(host.vms) : `${number(host.vms)} \u2192 ${number(host.vms_after)}`) },
      { label: t('overview.why'), minor: true, cell: (host) => host.closed ?? '' },
    ];
    return card(t('nav.hosts'), { end: when(round.at) }, table(columns, round.hosts, { label: t('nav.hosts'), id: (host) => host.host }));
  }

  function moves() {
    return card(t('moves.plan'), {},
      round.moves.length > 0 ? moveTable(round.moves) : empty(round.nothing ?? t('balance.nothing')),
      round.left.length > 0 && h('div', { class: 'body' }, stays(round.left)));
  }

  function history() {
    const columns = [
      { label: t('audit.at'), cell: (one) => clock(one.at) },
      { label: t('moves.plan'), cell: (one) => h('ul', null, one.moves.map((move) => h('li', null, t('balance.move', { vm: move.vm.name, from: move.from, to: move.to }), ' ', h('small', { class: 'soft' }, move.why)))) },
      { label: t('jobs.job'), cell: (one) => (one.job ? h('a', { href: api.path(['jobs', one.job]) }, t('kind.balance')) : t('balance.recommended')) },
    ];
    return card(t('balance.history'), {}, rounds.length === 0 ? empty(t('balance.no-history')) : table(columns, rounds, { label: t('balance.history'), id: (one) => one.at }));
  }

  return {
    title: () => t('nav.balance'),
    async load() {
      [status, rounds] = await Promise.all([api.get(['balance']), api.get(['balance', 'history'], { limit: ROUNDS_MAX })]);
      round = status.last ?? round;
    },
    on: {
      balance(next) {
        round = next;
        return true;
      },
    },
    view: () => [
      head(t('nav.balance'), {
        lead: [t(`balance.mode-${status.mode}`, { time: duration(status.interval_s), level: status.eagerness })],
        actions: api.may(who, 'operator') && [
          button(isBusy ? t('moves.looking') : t('balance.plan'), plan, { disabled: isBusy }),
          button(t('balance.apply'), apply, { kind: 'primary', sign: 'move', disabled: isBusy })],
      }),
      h('div', { class: 'stack', key: 'all' },
        !round && empty(t('balance.none')),
        round?.error && note('bad', round.error),
        round && !round.error && [hosts(), moves()],
        history()),
    ],
  };
}

// The hosts as one: who belongs, who is there, who leads, whether the state answers, what a person should look at.

import * as api from '../api.js';
import { h } from '../dom.js';
import { clock, number, when } from '../format.js';
import { t } from '../i18n.js';
import { attempt, button, card, chip, confirm, dialog, empty, ends, facts, head, note, soon, table } from '../ui.js';
import { hostPath, load as loadOf, memory } from './shared.js';

const HOSTS_MAX = 1000;
// Who beats is no message of the stream where nothing else changes.
const AGAIN_MS = 10000;

export default function cluster({ who, load }) {
  let [data, hosts] = [null, new Map()];
  const later = soon(load);
  const again = setInterval(() => !document.hidden && load(), AGAIN_MS);
  const isAdmin = api.may(who, 'admin');

  async function add() {
    const made = await attempt(() => api.post(['cluster', 'tokens'], {}, api.newKey()));
    if (!made) return;
    await dialog(t('cluster.add'), (finish) => [
      h('p', null, t('cluster.add-text')),
      h('div', { class: 'secret' }, h('code', null, `virtward cluster join - --at ${made.address} --address ADDRESS:8461`)),
      h('p', null, t('cluster.add-token')),
      h('div', { class: 'secret' }, h('code', { id: 'secret' }, made.token)),
      note('warn', t('cluster.add-once'), h('span', null, t('tokens.expires'), ' ', clock(made.expires))),
      ends(button(t('tokens.stored'), () => finish(true), { kind: 'primary' }))]);
  }

  async function remove(node) {
    if (!await confirm(t('cluster.remove-title', { name: node.name }), t('cluster.remove-text'), t('cluster.remove'))) return;
    await attempt(() => api.remove(['cluster', 'nodes', node.name]));
    load();
  }

  const isLeader = (node) => data.leader?.node === node.name;
  const hostOf = (node) => hosts.get(node.host);

  function summary() {
    const silent = data.nodes.filter((node) => !node.is_there).map((node) => node.name);
    const there = data.nodes.length - silent.length;
    const versions = [...new Set(data.nodes.map((node) => node.version).filter(Boolean))];
    const members = data.state.split(',').length;
    const stat = (label, value, detail, tone = '') => h('div', { class: 'card stat', key: label }, h('span', { class: 'label' }, label), h('b', { class: tone }, value), h('small', null, detail));
    return h('div', { class: 'stats', key: 'stats' },
      stat(t('cluster.daemons'), t('cluster.of', { part: number(there), all: number(data.nodes.length) }), silent.length === 0 ? t('cluster.all-there') : t('cluster.some-away', { names: silent.slice(0, 4).join(', ') + (silent.length > 4 ? ' …' : '') }), silent.length === 0 ? '' : 'bad-text'),
      stat(t('cluster.leader'), data.leader?.node ?? (data.nodes.length > 1 ? '–' : data.node), data.leader ? [t('cluster.epoch', { epoch: data.leader.epoch }), ' · ', when(data.leader.since)] : data.nodes.length > 1 ? t('cluster.no-leader') : t('cluster.leads-alone'), data.leader || data.nodes.length === 1 ? '' : 'warn-text'),
      stat(t('cluster.state'), data.state_error ? t('cluster.state-away') : t('cluster.state-ok'), data.state_error ? t('cluster.state-away-short') : members > 1 ? t('cluster.members', { n: members }) : h('code', null, data.state), data.state_error ? 'bad-text' : ''),
      stat(t('cluster.version'), versions.length > 1 ? t('cluster.mixed') : versions[0] ?? '–', versions.length > 1 ? versions.join(', ') : t('cluster.one-version'), versions.length > 1 ? 'warn-text' : ''));
  }

  function nodes() {
    const columns = [
      { label: t('cluster.node'), cell: (node) => [node.host ? h('a', { class: 'name', href: hostPath(node.host) }, node.name) : h('span', { class: 'strong' }, node.name), isLeader(node) && [' ', h('span', { class: 'chip info' }, t('cluster.leads'))], node.name === data.node && [' ', h('span', { class: 'tag' }, t('hosts.local'))], node.address && h('div', null, h('small', null, h('code', null, node.address)))] },
      { label: t('cluster.daemon'), cell: (node) => [h('span', { class: `chip ${node.is_there ? 'good' : 'bad'}` }, node.is_there ? t('cluster.there') : t('cluster.silent')), h('div', null, h('small', null, node.is_there ? [node.version, node.started && [' · ', t('cluster.started'), ' ', when(node.started)]] : node.reason))] },
      { label: t('hosts.host'), cell: (node) => [node.host && node.host !== node.name && [h('a', { href: hostPath(node.host) }, node.host), ' '], chip('host', node.host_state)] },
      { label: t('hosts.vms-running'), num: true, cell: (node) => (hostOf(node) ? t('hosts.vms-short', { all: number(hostOf(node).vms), running: number(hostOf(node).vms_running) }) : '–') },
      { label: t('hosts.jobs'), minor: true, num: true, cell: (node) => number(hostOf(node)?.jobs_running) },
      { label: t('hosts.load'), cell: (node) => (hostOf(node) ? loadOf(hostOf(node)) : '–') },
      { label: t('hosts.memory'), minor: true, cell: (node) => (hostOf(node) ? memory(hostOf(node)) : '–') },
      isAdmin && data.is_cluster && { label: t('list.actions'), blank: true, num: true, cell: (node) => (node.name === data.node ? '' : button(t('cluster.remove'), () => remove(node), { kind: 'quiet small danger', label: t('cluster.remove-label', { name: node.name }) })) },
    ];
    return card(t('cluster.nodes'), {}, data.nodes.length === 0 ? empty(t('hosts.none')) : table(columns.filter(Boolean), data.nodes, { label: t('cluster.nodes'), id: (node) => node.name }));
  }

  function identity() {
    return card(t('cluster.identity'), {}, h('div', { class: 'body' }, facts(
      [t('cluster.state'), data.state.split(',').map((url) => h('div', { key: url }, h('code', null, url)))],
      data.authority_sha256 && [t('cluster.authority'), h('code', null, data.authority_sha256)],
      [t('cluster.answers'), data.node])));
  }

  return {
    title: () => t('cluster.title'),
    async load() {
      const [status, page] = await Promise.all([api.get(['cluster']), api.get(['hosts'], { limit: HOSTS_MAX })]);
      [data, hosts] = [status, new Map(page.items.map((host) => [host.name, host]))];
    },
    end() {
      clearInterval(again);
      later.stop();
    },
    on: { host: later, event: later },
    view: () => [
      head(t('cluster.title'), { actions: isAdmin && data.is_cluster && button(t('cluster.add'), add, { sign: 'plus' }), lead: data.is_cluster ? undefined : t('cluster.alone') }),
      h('div', { class: 'stack', key: 'all' },
        h('div', { role: 'status', class: 'worries stack tight', key: 'worries' },
          data.state_error && note('bad', h('b', null, t('cluster.state-lost')), t('cluster.state-lost-means'), data.state_error),
          data.warnings.map((warning) => note('warn', warning))),
        summary(), nodes(), identity()),
    ],
  };
}

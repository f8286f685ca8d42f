// Hosts, one line each. That a host is down, that only its libvirtd is, and that nobody can tell are three things, and are
// said so.

import * as api from '../api.js';
import { h } from '../dom.js';
import { number } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, choices, empty, head, table } from '../ui.js';
import { health, hostPath, keep, load as loadOf, memory, room } from './shared.js';

const STATES = ['up', 'libvirtd-down', 'down', 'unknown'];
const FIELDS = { up: 'up', 'libvirtd-down': 'libvirtd_down', down: 'down', unknown: 'unknown' };

export default function hosts({ query, go, load, update }) {
  const filter = { name: query.get('name') ?? '', state: query.get('state') ?? '' };
  let [items, next, total, counts, typing] = [[], null, 0, {}, null];

  function choose(name, value) {
    filter[name] = value;
    keep(go, filter);
    load();
  }

  function search(event) {
    const { value } = event.target;
    clearTimeout(typing);
    typing = setTimeout(() => choose('name', value.trim()), 250);
  }

  async function more() {
    const page = await api.get(['hosts'], { ...filter, cursor: next });
    items.push(...page.items);
    next = page.next;
    update();
  }

  const columns = () => [
    { label: t('hosts.host'), cell: (host) => [h('a', { class: 'name', href: hostPath(host.name) }, host.name), host.is_local && [' ', h('span', { class: 'tag' }, t('hosts.local'))]] },
    { label: t('hosts.state'), cell: (host) => [chip('host', host.state, t(`host.${host.state}`)), host.health && ['warning', 'critical'].includes(host.health.level) && [' ', health(host)], host.state !== 'up' && h('div', null, h('small', null, host.reason))] },
    { label: t('hosts.vms-running'), num: true, cell: (host) => h('a', { href: api.path(['vms'], { host: host.name }) }, t('hosts.vms-short', { all: number(host.vms), running: number(host.vms_running) })) },
    { label: t('hosts.jobs'), minor: true, num: true, cell: (host) => number(host.jobs_running) },
    { label: t('hosts.load'), cell: loadOf },
    { label: t('hosts.memory'), cell: memory },
    { label: t('hosts.storage'), cell: room },
    { label: t('hosts.versions'), minor: true, cell: (host) => h('small', { class: 'nowrap' }, `libvirt ${host.libvirt_version ?? '–'} · QEMU ${host.qemu_version ?? '–'}`) },
  ];

  return {
    title: () => t('nav.hosts'),
    async load() {
      const [page, overview] = await Promise.all([api.get(['hosts'], filter), api.get(['overview'])]);
      [items, next, total, counts] = [page.items, page.next, page.total, overview.hosts];
    },
    end: () => clearTimeout(typing),
    on: {
      host(host) {
        const at = items.findIndex((known) => known.name === host.name);
        if (at < 0) return false;
        items[at] = { ...host, jobs_running: items[at].jobs_running };
        return true;
      },
    },
    view: () => [
      head(t('nav.hosts')),
      h('div', { class: 'tools', role: 'search', key: 'tools' },
        h('input', { type: 'search', class: 'search', value: filter.name, oninput: search, placeholder: t('hosts.search'), 'aria-label': t('hosts.search') }),
        choices(t('hosts.state'), filter.state, STATES.map((name) => [name, t(`host.${name}`), counts[FIELDS[name]]]), (value) => choose('state', value)),
        h('span', { class: 'end', role: 'status' }, t('hosts.count', { n: total, shown: number(total) }))),
      card('', { key: 'list' }, items.length === 0 ? empty(t('hosts.none')) : table(columns(), items, { label: t('nav.hosts'), id: (host) => host.name, more: next && more })),
    ],
  };
}

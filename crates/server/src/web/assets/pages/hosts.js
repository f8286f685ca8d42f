// Hosts. That a host is down, that only its libvirtd is, and that nobody can tell are three things, and are said so.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, number, when } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, empty, facts, gauge, head, note, tone } from '../ui.js';

export default function hosts({ update }) {
  let [items, next] = [[], null];

  async function read(cursor) {
    const page = await api.get(['hosts'], { cursor });
    items = cursor ? [...items, ...page.items] : page.items;
    next = page.next;
  }

  function storage(one) {
    return h('div', { class: 'stack tight', key: one.path },
      h('div', { class: 'row' }, h('code', null, one.path), h('small', { class: 'soft' }, t('hosts.disks', { n: one.disks }))),
      gauge(one.total_bytes - one.free_bytes, one.total_bytes, one.path),
      h('small', { class: 'soft' }, t('hosts.free-of', { free: bytes(one.free_bytes), total: bytes(one.total_bytes) })));
  }

  function one(host) {
    const isUp = host.state === 'up';
    return h('article', { class: 'card', key: host.name, 'aria-label': host.name },
      h('header', null, h('h2', null, host.name), chip('host', host.state), host.is_local && h('span', { class: 'tag' }, t('hosts.local')), h('div', { class: 'end' }, t('hosts.since'), ' ', when(host.since))),
      h('div', { class: 'body stack' },
        !isUp && note(tone('host', host.state), h('b', null, t(`hosts.${host.state}-means`)), host.reason, host.seen && h('span', null, t('hosts.seen'), ' ', when(host.seen))),
        facts(
          [t('nav.vms'), h('a', { href: api.path(['vms'], { host: host.name }) }, t('hosts.vms', { all: number(host.vms), running: number(host.vms_running) }))],
          [t('hosts.jobs'), number(host.jobs_running)],
          host.cpus !== null && [t('hosts.load'), t('hosts.load-of', { load: host.load === null ? '–' : number(host.load, 2), cpus: number(host.cpus) })],
          [t('hosts.versions'), `libvirt ${host.libvirt_version ?? '–'} · QEMU ${host.qemu_version ?? '–'}`],
          [t('hosts.uri'), h('code', null, host.uri)]),
        host.memory_bytes !== null && host.memory_available_bytes !== null && h('div', { class: 'stack tight', key: 'memory' },
          h('span', { class: 'label' }, t('hosts.memory')),
          gauge(host.memory_bytes - host.memory_available_bytes, host.memory_bytes, t('hosts.memory')),
          h('small', { class: 'soft' }, t('hosts.free-of', { free: bytes(host.memory_available_bytes), total: bytes(host.memory_bytes) }))),
        host.storage.map(storage)));
  }

  return {
    title: () => t('nav.hosts'),
    load: () => read(null),
    on: {
      host(host) {
        const at = items.findIndex((known) => known.name === host.name);
        if (at >= 0) items[at] = host;
        else items.push(host);
      },
    },
    view: () => [
      head(t('nav.hosts')),
      items.length === 0 ? card('', { key: 'none' }, empty(t('hosts.none'))) : h('div', { class: 'hosts', key: 'hosts' }, items.map(one)),
      next && h('p', { class: 'empty', key: 'more' }, h('button', { type: 'button', class: 'button', onclick: () => read(next).then(update) }, t('list.more'))),
    ],
  };
}

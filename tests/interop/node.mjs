/**
 * A js-libp2p node (TCP, Noise, yamux) that a test drives.
 *
 * It prints one line of JSON when it listens, `{"id": ..., "addrs": [...]}`, then answers one line of JSON on
 * stdin, `{"call": 1, "do": "ping", "addr": ...}`, with one on stdout, `{"call": 1, "result": ...}` or
 * `{"call": 1, "error": ...}`. Bytes travel as base64. It ends with its stdin.
 */
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'

import { noise } from '@chainsafe/libp2p-noise'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { dcutr } from '@libp2p/dcutr'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

import { checkEcho, echo, PROTOCOL } from './stream.mjs'

// js-libp2p is written for Node 22; this is all that it misses on Node 20.
Promise.withResolvers ??= function () {
  const deferred = {}
  deferred.promise = new Promise((resolve, reject) => Object.assign(deferred, { resolve, reject }))
  return deferred
}

const NAMESPACE = 'swarmcore'
const SEQUENCE_BYTES = 8
const MAX_WINDOW_BYTES = 2 ** 24
const CALL_TIMEOUT_MS = 30_000

const { values: flags } = parseArgs({
  options: {
    listen: { type: 'string', multiple: true, default: ['/ip4/127.0.0.1/tcp/0'] },
    announce: { type: 'string', multiple: true, default: [] },
    echo: { type: 'boolean', default: false },
    relay: { type: 'boolean', default: false },
    'relay-bytes': { type: 'string', default: '0' }, // most bytes through one circuit; 0 for no limit
    dht: { type: 'boolean', default: false },
    'dht-protocol': { type: 'string', default: '/ipfs/kad/1.0.0' },
    dcutr: { type: 'boolean', default: false }
  }
})

function relayServer () {
  const bytes = BigInt(flags['relay-bytes'])
  return circuitRelayServer({ reservations: { applyDefaultLimit: bytes > 0n, defaultDataLimit: bytes } })
}

/** The sequence number that a record's value begins with: eight bytes, big-endian. */
function sequence (value) {
  return Buffer.from(value).readBigUInt64BE()
}

function dht () {
  return kadDHT({
    protocol: flags['dht-protocol'],
    clientMode: false, // left out, a node without a public address is a client
    peerInfoMapper: passthroughMapper, // by default a peer on a private address is not taken into the table
    validators: {
      [NAMESPACE]: async (key, value) => {
        if (value.byteLength < SEQUENCE_BYTES) throw new Error('a value begins with its sequence number')
      }
    },
    selectors: {
      [NAMESPACE]: (key, values) => values.reduce(
        (best, value, index) => sequence(value) > sequence(values[best]) ? index : best, 0)
    }
  })
}

const node = await createLibp2p({
  addresses: { listen: flags.listen, appendAnnounce: flags.announce },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  // By default a paused stream is reset at 4 MiB unread, less than the window that it grants.
  streamMuxers: [yamux({ streamOptions: { maxReadBufferLength: 2 * MAX_WINDOW_BYTES } })],
  services: {
    identify: identify(),
    identifyPush: identifyPush(),
    ping: ping(),
    ...(flags.relay && { relay: relayServer() }),
    ...(flags.dht && { dht: dht() }),
    ...(flags.dcutr && { dcutr: dcutr() })
  }
})
if (flags.echo) await node.handle(PROTOCOL, echo, { runOnLimitedConnection: true })

function options () {
  return { signal: AbortSignal.timeout(CALL_TIMEOUT_MS), runOnLimitedConnection: true }
}

const calls = {
  /** Milliseconds of one round trip. */
  ping: ({ addr }) => node.services.ping.ping(multiaddr(addr), options()),
  connect: async ({ addr }) => (await node.dial(multiaddr(addr), options())).remoteAddr.toString(),
  dial: async ({ addr, protocol, sizes }) => {
    const stream = await node.dialProtocol(multiaddr(addr), protocol, options())
    await checkEcho(stream, sizes)
  },
  put: ({ key, value }) =>
    node.contentRouting.put(Buffer.from(key), Buffer.from(value, 'base64'), options()),
  get: async ({ key }) =>
    Buffer.from(await node.contentRouting.get(Buffer.from(key), options())).toString('base64'),
  /** Every open connection: to whom, where, whether a relay limits it, and what the peer speaks. */
  peers: async () => Promise.all(node.getConnections().map(async connection => ({
    id: connection.remotePeer.toString(),
    addr: connection.remoteAddr.toString(),
    direction: connection.direction,
    limited: connection.limits != null,
    protocols: (await node.peerStore.get(connection.remotePeer)).protocols
  }))),
  /** Reserve a slot at a relay; the addresses of this node, the one through the relay among them. */
  reserve: async ({ addr }) => {
    await node.components.transportManager.listen([multiaddr(addr).encapsulate('/p2p-circuit')])
    return node.getMultiaddrs().map(String)
  },
  addrs: () => node.getMultiaddrs().map(String),
  stop: () => node.stop()
}

async function answer ({ call, do: name, ...args }) {
  try {
    return { call, result: await calls[name](args) ?? null }
  } catch (reason) {
    const error = reason.error ?? reason // a stream that fails while it is written to rejects with its event
    return { call, error: `${error.name ?? 'closed'}: ${error.message}` }
  }
}

function print (message) {
  process.stdout.write(JSON.stringify(message) + '\n')
}

const commands = createInterface({ input: process.stdin })
commands.on('line', async line => {
  const message = JSON.parse(line)
  print(await answer(message))
  if (message.do === 'stop') commands.close()
})
commands.on('close', async () => {
  await node.stop()
  process.stdout.write('', () => process.exit()) // once all that was printed has gone out
})
print({ id: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) })

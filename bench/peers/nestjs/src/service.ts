// The service that answers. It keeps nothing: what is measured is the way there and back.
import 'reflect-metadata';
import { Controller, Module } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { MessagePattern, MicroserviceOptions, Payload, Transport } from '@nestjs/microservices';

interface Upsert {
  slug: string;
  project: string;
  name: string;
}

@Controller()
class EpisodesController {
  @MessagePattern('nestjs.episodes')
  upsert(@Payload() episode: Upsert) {
    return { id: `${episode.slug}/${episode.project}/${episode.name}`, name: episode.name, status: 'running' };
  }
}

@Module({ controllers: [EpisodesController] })
class ServiceModule {}

async function main() {
  const app = await NestFactory.createMicroservice<MicroserviceOptions>(ServiceModule, {
    transport: Transport.KAFKA,
    logger: ['error', 'warn'],
    options: {
      client: { clientId: 'service', brokers: [process.env.BROKER!] },
      consumer: { groupId: 'nestjs-service' },
    },
  });
  await app.listen();
}

void main();
